// Blocks of signatures: their layout, and what encodes them. The layout and the exact operations
// are those of vllm_magicpig/signature_blocks.py.
#pragma once

#include "magicpig.h"

namespace magicpig {

constexpr int kSignatureBlock = 128;  // tokens that share a mean
constexpr int kSignatureTile = 64;
constexpr float kMostFactor = 32767.0f;

/// Where a 16-bit value of a tile's token lies: as unpacklo_epi8 and unpackhi_epi8 put it.
inline int signature_place(int token) {
  return (token >> 3 & 1) << 5 | token >> 4 << 3 | (token & 7);
}

/// A block of one kv head: two tiles of codes and factors, then the header.
struct SignatureLayout {
  int head_size;
  int size;  // of the rotation: the power of two from head_size up
  int bits;  // 1, 2 or 4

  static SignatureLayout of(int head_size, int bits) {
    int size = 1;
    while (size < head_size) size *= 2;
    return {head_size, size, bits};
  }

  /// Dimensions that are added up in 8 bits.
  int sum_dimensions() const { return size < 64 ? size : 64; }
  size_t tile_bytes() const {
    return static_cast<size_t>(kSignatureTile) * static_cast<size_t>(bits * size / 8 + 2);
  }
  size_t header() const { return 2 * tile_bytes(); }
  size_t block_bytes() const {
    return (header() + 2 * static_cast<size_t>(head_size) + 8 + 63) / 64 * 64;
  }
};

/// Encodes num_blocks blocks of keys, key_stride bytes from one token to the next, each into
/// layout.block_bytes() of `to`. signs: [2][size], 1 or -1.
void encode_signatures(const SignatureLayout& layout, RowType type, const int8_t* signs,
                       const uint8_t* keys, size_t key_stride, size_t num_blocks, uint8_t* to,
                       Isa isa, ThreadPool& pool);

}  // namespace magicpig
