// What the binding files share: arrays checked into pointers, and the objects that own memory.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "magicpig.h"
#include "signatures.h"
#include "stream.h"

namespace magicpig {

namespace py = pybind11;

/// bindings_signatures.cpp.
void bind_signatures(py::module_& m);
/// bindings_decode.cpp.
void bind_decode(py::module_& m);
/// bindings_stream.cpp.
void bind_streams(py::module_& m);

/// Block tables and lengths; every block that a length needs is checked.
Requests requests_of(const Pages& pages, const py::array& block_tables, const py::array& seq_lens);

/// An array argument: never converted, since what is written into a copy is lost.
inline py::arg array_arg(const char* name) { return py::arg(name).noconvert(); }

// --------------------------------------------------------------------------------------- objects

/// The pages, and the array whose memory they are.
struct BoundPages {
  py::array memory;
  Pages pages;
};

/// The index, the pages that it reads, and who may be building for it.
struct BoundIndex {
  std::shared_ptr<BoundPages> pages;
  LshIndex index;
  std::weak_ptr<SegmentBuilder> builder;

  BoundIndex(std::shared_ptr<BoundPages> pages_, int num_bits, std::vector<int> levels,
             size_t max_bytes)
      : pages(std::move(pages_)), index(pages->pages, num_bits, std::move(levels), max_bytes) {}
  ~BoundIndex() {
    if (const std::shared_ptr<SegmentBuilder> asked = builder.lock()) {
      py::gil_scoped_release release;
      asked->forget(index);
    }
  }
};

/// The signatures, their memory and the pages that they are of.
struct BoundSignatures {
  std::shared_ptr<BoundPages> pages;
  py::array memory;
  SignaturePool pool;

  BoundSignatures(std::shared_ptr<BoundPages> pages_, py::array memory_, uint8_t* data,
                  const SignatureLayout& layout, const int8_t* signs)
      : pages(std::move(pages_)),
        memory(std::move(memory_)),
        pool(pages->pages, data, layout, signs) {}
};

// ---------------------------------------------------------------------------------------- checks

inline void check_isa(Isa isa) {
  if (!isa_available(isa))
    refuse("isa is ", isa_name(isa),
           ", which this build or this CPU lacks; use resolve_isa(\"auto\")"
           " or \"portable\".");
}

inline RowType row_type_named(const std::string& row_dtype) {
  if (row_dtype == "float32") return RowType::float32;
  if (row_dtype == "bfloat16") return RowType::bfloat16;
  if (row_dtype == "float16") return RowType::float16;
  refuse("row_dtype is \"", row_dtype,
         "\", but must be \"float32\", \"bfloat16\" or \"float16\"; "
         "set the KV cache's dtype to one of them.");
}

inline int check_head_size(int64_t head_size) {
  if (head_size < 16 || head_size > kMaxHeadSize || head_size % 8 != 0)
    refuse("head_size is ", head_size, ", but must be a multiple of 8 in 16..", kMaxHeadSize,
           "; use another backend for this model.");
  return static_cast<int>(head_size);
}

/// One dimension of a shape: its name, and its size where that is given.
struct Dim {
  const char* name;
  int64_t size = -1;
};

inline std::string shape_text(const py::ssize_t* shape, py::ssize_t ndim) {
  std::ostringstream text;
  text << '(';
  for (py::ssize_t i = 0; i < ndim; ++i) text << (i ? ", " : "") << shape[i];
  text << ')';
  return text.str();
}
inline std::string shape_text(const py::array& array) {
  return shape_text(array.shape(), array.ndim());
}

inline void check_shape(const char* name, const py::ssize_t* shape, py::ssize_t ndim,
                        std::initializer_list<Dim> dims) {
  const bool fits =
      std::equal(dims.begin(), dims.end(), shape, shape + ndim,
                 [](const Dim& dim, py::ssize_t size) { return dim.size < 0 || dim.size == size; });
  if (fits) return;
  std::ostringstream wanted;
  const char* comma = "";
  for (const Dim& dim : dims) {
    wanted << comma << dim.name;
    if (dim.size >= 0) wanted << " = " << dim.size;
    comma = ", ";
  }
  refuse(name, " has shape ", shape_text(shape, ndim), ", but [", wanted.str(),
         "] is needed; reshape it.");
}
inline void check_shape(const char* name, const py::array& array, std::initializer_list<Dim> dims) {
  check_shape(name, array.shape(), array.ndim(), dims);
}

template <class T>
void check_dtype(const char* name, const py::array& array) {
  if (!py::isinstance<py::array_t<T>>(array))
    refuse(name, " is ", py::cast<std::string>(py::str(array.dtype())), ", but ",
           py::cast<std::string>(py::str(py::dtype::of<T>())), " is needed; convert it.");
  if (!(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_))
    refuse(name, " is not aligned to its ", sizeof(T), "-byte elements; copy it.");
}

template <class T>
const T* input(const char* name, const py::array& array, std::initializer_list<Dim> dims) {
  check_shape(name, array, dims);
  check_dtype<T>(name, array);
  if (!(array.flags() & py::array::c_style))
    refuse(name, " of shape ", shape_text(array),
           " is not C-contiguous, but is read as one run of memory; use np.ascontiguousarray.");
  return static_cast<const T*>(array.data());
}

template <class T>
T* output(const char* name, py::array& array, std::initializer_list<Dim> dims) {
  input<T>(name, array, dims);
  if (!array.writeable())
    refuse(name, " of shape ", shape_text(array),
           " is read-only, but is written; pass a writable "
           "array.");
  return static_cast<T*>(array.mutable_data());
}

/// The addresses [begin, end) that the elements of an array lie between, whatever its strides.
struct Extent {
  uintptr_t begin, end;
};

template <class Shape, class Strides>
Extent extent_of(const void* data, py::ssize_t itemsize, py::ssize_t ndim, const Shape& shape,
                 const Strides& strides) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(data);
  Extent extent = {first, first + static_cast<uintptr_t>(itemsize)};
  for (py::ssize_t i = 0; i < ndim; ++i) {
    if (shape[i] == 0) return {first, first};
    const py::ssize_t reach = (shape[i] - 1) * strides[i];
    (reach < 0 ? extent.begin : extent.end) += static_cast<uintptr_t>(reach);
  }
  return extent;
}

/// Memory by name: a part of a sentence.
struct Named {
  const char* name;
  Extent extent;

  Named(const char* name_, Extent extent_) : name(name_), extent(extent_) {}
  Named(const char* name_, const py::array& array)
      : name(name_),
        extent(extent_of(array.data(), array.itemsize(), array.ndim(), array.shape(),
                         array.strides())) {}
};

/// What is written would change what was checked, block numbers and codes among it.
inline void check_apart(const Named& written, std::initializer_list<Named> others) {
  for (const Named& other : others) {
    if (written.extent.begin < other.extent.end && other.extent.begin < written.extent.end)
      refuse(other.name, " shares memory with ", written.name,
             ", which is written meanwhile; pass a copy.");
  }
}

inline void check_whole_rows(const char* name, py::ssize_t stride, py::ssize_t item) {
  if (stride != item)
    refuse(name, " has a stride of ", stride,
           " bytes in its last dimension, but rows must be contiguous (", item, "); copy it.");
}

/// Keys or values, in any strides but with whole rows contiguous.
inline RowsView rows_view(const char* name, const py::array& array, const Pages& pages,
                          int64_t num_tokens) {
  check_shape(name, array,
              {{"num_tokens", num_tokens},
               {"num_kv_heads", pages.num_kv_heads()},
               {"head_size", pages.layout().head_size}});
  if (pages.layout().row_type == RowType::float32)
    check_dtype<float>(name, array);
  else
    check_dtype<uint16_t>(name, array);
  if (array.size() > 0) check_whole_rows(name, array.strides(2), array.itemsize());
  return {static_cast<const uint8_t*>(array.data()), array.strides(0), array.strides(1)};
}

inline const int64_t* slots_of(const py::array& slots, const Pages& pages, int64_t num_tokens,
                               int64_t lowest) {
  const int64_t* slot = input<int64_t>("slots", slots, {{"num_tokens", num_tokens}});
  for (py::ssize_t i = 0; i < slots.size(); ++i) check_slot(pages, i, slot[i], lowest);
  return slot;
}

inline int check_query_heads(int64_t num_q_heads, const Pages& pages) {
  const int64_t heads = pages.num_kv_heads();
  if (num_q_heads < heads || num_q_heads % heads != 0 || num_q_heads / heads > 64)
    refuse("num_q_heads is ", num_q_heads, ", but must be 1..64 times the pages' ", heads,
           " kv heads; pass the query of this layer.");
  return static_cast<int>(num_q_heads);
}

inline float finite_scale(double scale) {
  if (!(std::abs(scale) <= std::numeric_limits<float>::max()))
    refuse("scale is ", scale, ", but must be finite in float32; pass the model's softmax scale.");
  return static_cast<float>(scale);
}

/// The rule, and the table that it reads.
struct BoundRule {
  std::shared_ptr<InclusionTable> table;
  SampleRule rule;
};

/// That the rule's codes are those of these pages and of the index.
inline void check_rule(const SampleRule& rule, const Pages& pages, const LshIndex* index) {
  const InclusionTable& table = *rule.table;
  if (table.num_tables() != pages.layout().num_tables)
    refuse("rule is for L = ", table.num_tables(), ", but the pages hold codes of ",
           pages.layout().num_tables, " tables; make both for the same L.");
  if (index != nullptr && table.num_bits() != index->num_bits())
    refuse("rule is for K = ", table.num_bits(), ", but the index for K = ", index->num_bits(),
           "; make both for the same K.");
}

inline py::array_t<int32_t> recent_rows(const DecodeRecord& record) {
  const std::vector<int32_t> rows = record.recent_rows();
  return py::array_t<int32_t>(static_cast<py::ssize_t>(rows.size()), rows.data());
}

inline void check_same_pages(const BoundIndex& index, const BoundPages& pages) {
  if (index.pages.get() != &pages)
    refuse("index belongs to other pages; pass the index made from these.");
}

/// That a layer of this rule, null in exact mode, can read this index, null without one.
inline void check_sampling(const BoundRule* rule, const BoundIndex* index,
                           const BoundPages& pages) {
  if (index != nullptr) {
    if (rule == nullptr)
      refuse("index is given without a rule, but exact attention reads none; pass both or None.");
    check_same_pages(*index, pages);
  }
  if (rule != nullptr)
    check_rule(rule->rule, pages.pages, index == nullptr ? nullptr : &index->index);
}

/// A layer's centre, copied.
inline std::vector<float> center_of(const BoundRule* rule, const Pages& pages,
                                    const py::array& center) {
  if (rule == nullptr)
    refuse("This layer has no rule, but a center is for codes; make it with a rule.");
  const float* value = input<float>(
      "center", center,
      {{"num_kv_heads", pages.num_kv_heads()}, {"head_size", pages.layout().head_size}});
  return {value, value + center.size()};
}

}  // namespace magicpig
