// Signatures of whole blocks, in tasks of one block.
#include <cstring>

#include "kernels.h"

namespace magicpig {

void encode_signatures(const SignatureLayout& layout, RowType type, const int8_t* signs,
                       const uint8_t* keys, size_t key_stride, size_t num_blocks, uint8_t* to,
                       Isa isa, ThreadPool& pool) {
  const std::vector<float> scaled = rotation_signs_of(layout, signs);
  pool.run(num_blocks, [&](size_t block, int) {
    uint8_t* out = to + block * layout.block_bytes();
    kernels_of(isa).encode_signatures(layout, type, scaled.data(),
                                      keys + block * kSignatureBlock * key_stride, key_stride, out);
    const size_t used = layout.header() + 2 * static_cast<size_t>(layout.head_size) + 8;
    std::memset(out + used, 0, layout.block_bytes() - used);
  });
}

}  // namespace magicpig
