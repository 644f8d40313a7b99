// Signatures of whole blocks, in tasks of one block.
#include <cstring>

#include "kernels.h"

namespace magicpig {

void encode_signatures(const SignatureLayout& layout, RowType type, const int8_t* signs,
                       const uint8_t* keys, size_t key_stride, size_t num_blocks, uint8_t* to,
                       Isa isa, ThreadPool& pool) {
  const size_t size = static_cast<size_t>(layout.size);
  std::vector<float> scaled(2 * size);  // the second round of signs divides, too
  for (size_t i = 0; i < size; ++i) {
    scaled[i] = static_cast<float>(signs[i]);
    scaled[size + i] = static_cast<float>(signs[size + i]) / static_cast<float>(size);
  }
  pool.run(num_blocks, [&](size_t block, int) {
    uint8_t* out = to + block * layout.block_bytes();
    kernels_of(isa).encode_signatures(layout, type, scaled.data(),
                                      keys + block * kSignatureBlock * key_stride, key_stride, out);
    const size_t used = layout.header() + 2 * static_cast<size_t>(layout.head_size) + 8;
    std::memset(out + used, 0, layout.block_bytes() - used);
  });
}

}  // namespace magicpig
