// Queries and outputs at the door: NumPy arrays, or torch's tensors.
#pragma once

#include <string>
#include <utility>

#include "bindings.h"
#include "dlpack_tensor.h"

namespace magicpig {

/// [n][num_heads][head_size]; strides in bytes, of whole rows that are contiguous.
struct RowsArgument {
  const char* name;
  uint8_t* data;
  RowType type;
  py::ssize_t ndim;
  py::ssize_t shape[3];
  py::ssize_t strides[3];
  bool writable;

  RowsView view() const { return {data, strides[0], strides[1]}; }
  Extent extent() const {
    return extent_of(data, static_cast<py::ssize_t>(element_bytes(type)), 3, shape, strides);
  }
};

inline const char* dtype_name(RowType type) {
  return type == RowType::bfloat16 ? "bfloat16" : type == RowType::float16 ? "float16" : "float32";
}

[[noreturn]] inline void refuse_dtype(const char* name, const std::string& dtype, RowType type) {
  refuse(name, " is ", dtype, ", but must be float32 or what the pages hold, ", dtype_name(type),
         " (of an array its bits as uint16); convert it.");
}

inline void read_array(const py::array& array, RowType type, RowsArgument& found) {
  if (py::isinstance<py::array_t<float>>(array))
    found.type = RowType::float32;
  else if (type != RowType::float32 && py::isinstance<py::array_t<uint16_t>>(array))
    found.type = type;
  else
    refuse_dtype(found.name, py::cast<std::string>(py::str(array.dtype())), type);
  found.data = static_cast<uint8_t*>(const_cast<void*>(array.data()));
  found.writable = array.writeable();
  found.ndim = array.ndim();
  const py::ssize_t ndim = std::min<py::ssize_t>(found.ndim, 3);
  std::copy_n(array.shape(), ndim, found.shape);
  std::copy_n(array.strides(), ndim, found.strides);
}

inline RowType row_type_of(const DlTensor& tensor, const char* name, RowType type) {
  if (tensor.type_code == DlTensor::kFloat && tensor.type_bits == 32) return RowType::float32;
  const bool is_16_bit_float = tensor.type_bits == 16 && (tensor.type_code == DlTensor::kBfloat ||
                                                          tensor.type_code == DlTensor::kFloat);
  const RowType found =
      tensor.type_code == DlTensor::kBfloat ? RowType::bfloat16 : RowType::float16;
  if (is_16_bit_float && found == type) return type;
  const std::string kind = tensor.type_code == DlTensor::kBfloat  ? "bfloat"
                           : tensor.type_code == DlTensor::kFloat ? "float"
                                                                  : "not of floats but ";
  refuse_dtype(name, kind + std::to_string(tensor.type_bits), type);
}

inline void read_tensor(py::handle rows, RowType type, RowsArgument& found) {
  const DlExchange* exchange = dl_exchange_of(rows);
  if (exchange == nullptr) {
    const std::string kind = py::cast<std::string>(py::type::of(rows).attr("__name__"));
    if (py::hasattr(rows, "__dlpack__"))
      refuse(found.name, " is a ", kind,
             ", whose library has no DLPack C exchange table of version ",
             DlExchange::kMajorVersion, "; update it, or pass an array.");
    refuse(found.name, " is a ", kind, ", but must be an array or a tensor; pass one.");
  }
  DlTensor tensor = {};
  if (exchange->to_tensor(rows.ptr(), &tensor) != 0) {
    const py::error_already_set error;
    refuse(found.name, " is a tensor that is not in the CPU's memory (",
           py::cast<std::string>(py::str(error.value())), "); move it there.");
  }
  if (tensor.device_type != DlTensor::kCpu)
    refuse(found.name, " is on a device, but is read by the CPU; move it there.");
  found.type = row_type_of(tensor, found.name, type);
  found.data = static_cast<uint8_t*>(tensor.data) + tensor.byte_offset;
  found.writable = true;
  found.ndim = tensor.ndim;
  const py::ssize_t item = static_cast<py::ssize_t>(element_bytes(found.type));
  py::ssize_t contiguous = item;
  for (int i = std::min(tensor.ndim, 3) - 1; i >= 0; --i) {
    found.shape[i] = tensor.shape[i];
    found.strides[i] = tensor.strides == nullptr ? contiguous : tensor.strides[i] * item;
    contiguous *= tensor.shape[i];
  }
}

/// num_q_heads: -1 where any number will do. At least num_tokens rows.
inline RowsArgument rows_argument(const char* name, py::handle rows, const Pages& pages,
                                  int64_t num_tokens, int64_t num_q_heads) {
  RowsArgument found = {};
  found.name = name;
  const RowType type = pages.layout().row_type;
  if (py::isinstance<py::array>(rows))
    read_array(py::reinterpret_borrow<py::array>(rows), type, found);
  else
    read_tensor(rows, type, found);
  if (found.ndim > 3)
    refuse(name, " has ", found.ndim,
           " dimensions, but [num_tokens, num_q_heads, head_size] is needed; reshape it.");
  check_shape(
      name, found.shape, found.ndim,
      {{"num_tokens"}, {"num_q_heads", num_q_heads}, {"head_size", pages.layout().head_size}});
  if (found.shape[0] < num_tokens)
    refuse(name, " has ", found.shape[0], " rows, but the batch needs ", num_tokens,
           "; pass the rows of all of its tokens.");
  const py::ssize_t item = static_cast<py::ssize_t>(element_bytes(found.type));
  if (reinterpret_cast<uintptr_t>(found.data) % static_cast<uintptr_t>(item) != 0)
    refuse(name, " is not aligned to its ", item, "-byte elements; copy it.");
  if (found.shape[0] > 0 && found.shape[1] > 0) check_whole_rows(name, found.strides[2], item);
  return found;
}

/// That it can be written: the heads of a token one after the other, and no two tokens in one
/// place.
inline void check_output(const RowsArgument& rows) {
  if (!rows.writable) refuse(rows.name, " is read-only, but is written; pass a writable array.");
  const py::ssize_t head_bytes = rows.shape[2] * static_cast<py::ssize_t>(element_bytes(rows.type));
  if (rows.shape[0] == 0 || rows.shape[1] == 0) return;
  if ((rows.shape[1] > 1 && rows.strides[1] != head_bytes) ||
      (rows.shape[0] > 1 && rows.strides[0] < head_bytes * rows.shape[1]))
    refuse(rows.name, " has strides of ", rows.strides[0], " and ", rows.strides[1],
           " bytes, but the ", rows.shape[1], " heads of a token are written as one run of ",
           head_bytes, " bytes each; pass a copy.");
}

}  // namespace magicpig
