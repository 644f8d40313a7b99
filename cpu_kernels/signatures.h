// Blocks of signatures: their layout, and what encodes them. The layout and the exact operations
// are those of vllm_magicpig/signature_blocks.py.
#pragma once

#include "magicpig.h"

namespace magicpig {

struct Kernels;

constexpr int kSignatureTile = 64;
constexpr float kMostFactor = 32767.0f;
/// Powers of two stop at the least normal float: so many units of 1 / 128.
constexpr int kLeastPower = -126 * 128;

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
  /// By which sums of a token's table entries are shifted up to fill 16 bits.
  int sum_shift() const {
    const int most = 127 * ((1 << bits) - 1) * (size / sum_dimensions());
    int shift = 0;
    while (most << (shift + 1) <= 32767) ++shift;
    return shift;
  }
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

/// Signs of the rotation as kernels take them: [2][size] as floats, the second row over size, as
/// that round divides too.
std::vector<float> rotation_signs_of(const SignatureLayout& layout, const int8_t* signs);

// ------------------------------------------------------------------- pool (signature_pool.cpp)

/// The signatures of a layer's pages, in the caller's memory: [block][kv head][stretch of
/// kSignatureBlock tokens], each of layout.block_bytes().
///
/// A stretch is encoded once its rows are complete, and again once they are written anew: whatever
/// prefix is shared and whatever block changes its owner, nothing else is to be done.
class SignaturePool {
 public:
  /// memory: num_bytes(), zero or not; signs: [2][size], 1 or -1. The block size is a multiple of
  /// kSignatureBlock.
  SignaturePool(const Pages& pages, uint8_t* memory, SignatureLayout layout, const int8_t* signs);

  static size_t num_bytes(const Pages& pages, const SignatureLayout& layout);

  const Pages& pages() const { return pages_; }
  const SignatureLayout& layout() const { return layout_; }
  /// As encode_signatures of kernels.h takes them.
  const float* signs() const { return signs_.data(); }

  /// The signatures of a request's tokens from stretch * kSignatureBlock on.
  const uint8_t* signatures(const int32_t* blocks, int kv_head, int stretch) const {
    return memory_ + offset(blocks[stretch / stretches_], kv_head, stretch % stretches_);
  }

  /// Encodes what is complete of the requests and lacks its signatures. The rows are in the pages.
  /// Several threads may call this; the pages' rows are not written meanwhile.
  void encode(const Requests& requests, Isa isa, ThreadPool& pool);
  /// Stretches encoded since the start.
  uint64_t num_encoded() const { return num_encoded_.load(std::memory_order_relaxed); }

 private:
  struct Stretch {
    int block;
    int index;  // in its block
  };

  size_t offset(int block, int kv_head, int stretch) const {
    const size_t of_head = static_cast<size_t>(block) * static_cast<size_t>(num_kv_heads_) +
                           static_cast<size_t>(kv_head);
    return (of_head * static_cast<size_t>(stretches_) + static_cast<size_t>(stretch)) *
           layout_.block_bytes();
  }
  void encode(Stretch stretch, int kv_head, const Kernels& kernels);

  const Pages& pages_;
  uint8_t* const memory_;
  const SignatureLayout layout_;
  const std::vector<float> signs_;
  const int num_kv_heads_;
  const int stretches_;  // of a block
  std::mutex mutex_;     // guards what follows, and the memory against two that encode
  std::vector<uint32_t> encoded_writes_;  // Pages::writes of each stretch when it was encoded
  std::vector<Stretch> missing_;
  std::atomic<uint64_t> num_encoded_{0};
};

// ---------------------------------------------------------------- draw (signature_draw.cpp)

/// The list of a step: which rows, of what chances. Source: signature_draw.py.
struct SignatureRule {
  int sink_tokens;
  int window_tokens;
  double row_budget;  // fraction of the middle
  uint64_t seed;
  uint64_t layer;
  uint64_t first_kv_head;  // of this rank

  /// signature_reference.middle.
  TokenRange middle(int num_tokens) const;
  /// signature_reference.step_word up to the position; `part` completes it.
  uint64_t step_word(int kv_head, int num_tokens, int part) const;
};

constexpr int kNoiseEntries = 1 << 16;

/// -log2 of uniform numbers in units, in the order of signature_draw.noise_table; the chances that
/// follow from it. One for the process.
class NoiseTable {
 public:
  static const NoiseTable& instance();

  /// kSignatureTile entries from any index below kNoiseEntries on.
  const int16_t* entries() const { return entries_.data(); }
  /// Of kNoiseEntries, how many list a token of log chance M.
  uint32_t chances(int log_chance) const {
    if (log_chance > 0) return kNoiseEntries;
    const size_t k = static_cast<size_t>(-log_chance);
    return above_[k < above_.size() ? k : above_.size() - 1];
  }
  /// -log of the chance, nats; of a chance above 0.
  float cost(int log_chance) const {
    return log_chance > 0 ? 0.0f : costs_[static_cast<size_t>(-log_chance)];
  }
  /// signature_draw.floor_of.
  int floor_of(double phi) const;

 private:
  NoiseTable();

  std::vector<int16_t> entries_;  // kNoiseEntries, then the first kSignatureTile again
  std::vector<uint32_t> above_;   // entries above k
  std::vector<float> costs_;
};

/// How often each value was counted, over the range that they span.
class CountedChances {
 public:
  void start() { size_ = 0; }
  /// Tokens' A, in their places: those whose bit of `places` is set.
  void add(const int16_t* asked, uint64_t places);
  /// The largest log C whose chances, floor included, add up to no more than `rows` of m tokens.
  int solve(double rows, int m, int floor) const;

 private:
  std::vector<int16_t> values_;
  size_t size_ = 0;
  mutable std::vector<int32_t> counts_, at_least_;  // of each value; of it and more
};

/// A token of the list.
struct Listed {
  int32_t token;
  int16_t log_chance;  // at least the floor
};

/// The lists of all (request, kv head), as decode_attention draws them. For tests and tools.
std::vector<std::vector<Listed>> signature_lists(const Pages& pages, const Requests& requests,
                                                 const DecodeInput& input, Isa isa,
                                                 ThreadPool& pool);

}  // namespace magicpig
