// Signatures in Python: encoding.
#include "bindings.h"
#include "signatures.h"

namespace magicpig {

namespace {

py::array_t<uint8_t> encode_array(const py::array& keys, const std::string& row_dtype,
                                  const py::array& signs, int64_t bits, Isa isa, ThreadPool& pool) {
  check_isa(isa);
  const RowType type = row_type_named(row_dtype);
  check_shape("keys", keys, {{"n"}, {"head_size"}});
  const std::initializer_list<Dim> dims = {{"n"}, {"head_size"}};
  const void* key = type == RowType::float32
                        ? static_cast<const void*>(input<float>("keys", keys, dims))
                        : static_cast<const void*>(input<uint16_t>("keys", keys, dims));
  if (keys.shape(0) % kSignatureBlock != 0)
    refuse("keys are of ", keys.shape(0), " tokens, but blocks of ", kSignatureBlock,
           " are encoded; pass whole blocks.");
  const int head_size = check_head_size(keys.shape(1));
  if (bits != 1 && bits != 2 && bits != 4)
    refuse("bits is ", bits, ", but must be 1, 2 or 4; pass one of them.");
  const SignatureLayout layout = SignatureLayout::of(head_size, static_cast<int>(bits));
  const int8_t* sign = input<int8_t>("signs", signs, {{"2", 2}, {"size", layout.size}});
  for (py::ssize_t i = 0; i < signs.size(); ++i)
    if (sign[i] != 1 && sign[i] != -1)
      refuse("signs holds ", static_cast<int>(sign[i]), ", but must hold 1 and -1; pass signs.");
  const size_t num_blocks = static_cast<size_t>(keys.shape(0) / kSignatureBlock);
  py::array_t<uint8_t> blocks(
      {keys.shape(0) / kSignatureBlock, static_cast<py::ssize_t>(layout.block_bytes())});
  uint8_t* out = blocks.mutable_data();
  const size_t stride = static_cast<size_t>(head_size) * element_bytes(type);
  py::gil_scoped_release release;
  encode_signatures(layout, type, sign, static_cast<const uint8_t*>(key), stride, num_blocks, out,
                    isa, pool);
  return blocks;
}

}  // namespace

void bind_signatures(py::module_& m) {
  using py::arg;
  m.def("encode_signatures", &encode_array, array_arg("keys"), arg("row_dtype"), array_arg("signs"),
        arg("bits"), arg("isa"), arg("pool"));
}

}  // namespace magicpig
