// Tensors of other libraries without a call of Python, by DLPack's C exchange table: a step reads
// two per layer, and attributes would take longer than many of its stages in a cold cache.
//
// The declarations are those of DLPack 1.3 (github.com/dmlc/dlpack, include/dlpack/dlpack.h), whose
// layout stays within a major version; only what is read here has a name.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace magicpig {

struct DlTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  const int64_t* shape;
  const int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;

  static constexpr int32_t kCpu = 1;
  static constexpr uint8_t kFloat = 2;
  static constexpr uint8_t kBfloat = 4;
};

struct DlExchange {
  uint32_t major_version;
  uint32_t minor_version;
  void* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  /// Borrowed: valid as long as the object. -1 and a Python error where it cannot be read.
  int (*to_tensor)(void* object, DlTensor* tensor);
  void* current_stream;

  static constexpr uint32_t kMajorVersion = 1;
};

/// The table of a type, null where it has none that is read here. The last type's is kept.
inline const DlExchange* dl_exchange_of(pybind11::handle object) {
  static const PyTypeObject* last_type = nullptr;  // guarded by the GIL
  static const DlExchange* last = nullptr;
  PyTypeObject* const type = Py_TYPE(object.ptr());
  if (type == last_type) return last;
  const pybind11::object found = pybind11::getattr(reinterpret_cast<PyObject*>(type),
                                                   "__dlpack_c_exchange_api__", pybind11::none());
  if (!PyCapsule_IsValid(found.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* table =
      static_cast<const DlExchange*>(PyCapsule_GetPointer(found.ptr(), "dlpack_exchange_api"));
  if (table->major_version != DlExchange::kMajorVersion || table->to_tensor == nullptr)
    return nullptr;
  Py_INCREF(type);  // for good, as is its table
  last_type = type;
  return last = table;
}

}  // namespace magicpig
