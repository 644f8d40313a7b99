// Queries and outputs at the door: NumPy arrays, or torch's tensors.
//
// A step of one layer takes less than a millisecond, and each torch operation that turned a tensor
// into an array would take a tenth of that in a cold cache. So a tensor is asked for its memory
// here, by name: the extension does not link torch.
#pragma once

#include <string>
#include <utility>

#include "bindings.h"

namespace magicpig {

/// [n][num_heads][head_size]; strides in bytes, of whole rows that are contiguous.
struct RowsArgument {
  const char* name;
  uint8_t* data;
  RowType type;
  py::ssize_t shape[3];
  py::ssize_t strides[3];
  bool writable;

  RowsView view() const { return {data, strides[0], strides[1]}; }
  Extent extent() const {
    return extent_of(data, static_cast<py::ssize_t>(element_bytes(type)), 3, shape, strides);
  }
};

/// float32, or the pages' row dtype; of an array, whose elements are bits then, uint16.
inline RowType type_of_rows(const char* name, py::handle rows, const Pages& pages) {
  const RowType type = pages.layout().row_type;
  const char* const page_dtype = type == RowType::bfloat16  ? "torch.bfloat16"
                                 : type == RowType::float16 ? "torch.float16"
                                                            : "torch.float32";
  const std::string dtype = py::str(rows.attr("dtype"));
  if (dtype == "float32" || dtype == "torch.float32") return RowType::float32;
  if (type != RowType::float32 && (dtype == "uint16" || dtype == page_dtype)) return type;
  refuse(name, " is ", dtype, ", but must be float32 or what the pages hold, ", page_dtype,
         " (of an array its bits as uint16); convert it.");
}

inline RowsArgument rows_argument(const char* name, py::handle rows, const Pages& pages,
                                  int64_t num_reqs, int64_t num_q_heads) {
  RowsArgument found = {};
  found.name = name;
  const bool is_array = py::isinstance<py::array>(rows);
  if (!is_array && !py::hasattr(rows, "data_ptr"))
    refuse(name, " is a ", py::cast<std::string>(py::type::of(rows).attr("__name__")),
           ", but must be an array or a tensor; pass one.");
  found.type = type_of_rows(name, rows, pages);
  const py::ssize_t item = static_cast<py::ssize_t>(element_bytes(found.type));

  const py::tuple shape = rows.attr("shape");
  std::vector<py::ssize_t> sizes;
  for (const py::handle size : shape) sizes.push_back(py::cast<py::ssize_t>(size));
  check_shape(name, sizes.data(), static_cast<py::ssize_t>(sizes.size()),
              {{"num_reqs", num_reqs},
               {"num_q_heads", num_q_heads},
               {"head_size", pages.layout().head_size}});
  std::copy_n(sizes.data(), 3, found.shape);

  if (is_array) {
    const py::array array = py::reinterpret_borrow<py::array>(rows);
    found.data = static_cast<uint8_t*>(const_cast<void*>(array.data()));
    std::copy_n(array.strides(), 3, found.strides);
    found.writable = array.writeable();
  } else {
    if (!py::cast<bool>(rows.attr("is_cpu")))
      refuse(name, " is on ", py::cast<std::string>(py::str(rows.attr("device"))),
             ", but is read by the CPU; move it there.");
    found.data = reinterpret_cast<uint8_t*>(py::cast<uintptr_t>(rows.attr("data_ptr")()));
    const py::tuple strides = rows.attr("stride")();
    for (size_t i = 0; i < 3; ++i) found.strides[i] = py::cast<py::ssize_t>(strides[i]) * item;
    found.writable = true;
  }
  if (reinterpret_cast<uintptr_t>(found.data) % static_cast<uintptr_t>(item) != 0)
    refuse(name, " is not aligned to its ", item, "-byte elements; copy it.");
  if (found.shape[0] > 0 && found.shape[1] > 0) check_whole_rows(name, found.strides[2], item);
  return found;
}

/// That it can be written as one run of memory.
inline void check_output(const RowsArgument& rows) {
  if (!rows.writable) refuse(rows.name, " is read-only, but is written; pass a writable array.");
  const py::ssize_t head_bytes = rows.shape[2] * static_cast<py::ssize_t>(element_bytes(rows.type));
  if (rows.shape[0] == 0 || rows.shape[1] == 0) return;
  if ((rows.shape[1] > 1 && rows.strides[1] != head_bytes) ||
      (rows.shape[0] > 1 && rows.strides[0] != head_bytes * rows.shape[1]))
    refuse(rows.name, " is not contiguous, but is written as one run of memory; pass a copy.");
}

}  // namespace magicpig
