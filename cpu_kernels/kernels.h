// What each instruction set provides: sampled_attention.inl, compiled once per ISA.
#pragma once

#include "magicpig.h"

namespace magicpig {

/// A set of tokens: bit i of word w of a head is token 32 w + i.
struct MatchBits {
  uint32_t* words;
  size_t head_stride;  // words from one head to the next
};

/// How the rows of a sample are weighted; all of one query head.
struct Weighting {
  const InclusionTable* table;
  const float* center;  // [head_size]
  float query_norm;
  float query_dot_center;
};

/// The running softmax of one query head over the rows seen so far.
struct Softmax {
  float max;  // kNoMax before the first row
  float sum;  // of exp(logit - max)
};
/// Finite, so that the difference of two maxima is never inf - inf.
constexpr float kNoMax = -1e30f;

struct AttendArgs {
  RowType row_type;
  int head_size;
  float scale;
  const uint8_t* const* rows;  // K, then V
  int num_rows;
  int num_rows_ahead;    // pointers behind those, which the caller attends to next: prefetched only
  const float* queries;  // [num_heads][head_size]
  int num_heads;
  const Weighting* weighting;  // null: every row has u = 1; else num_heads is 1
  Softmax* softmax;            // [num_heads]
  float* acc;                  // [num_heads][head_size], sum of exp(logit - max) * V
};

struct Kernels {
  void (*pack_codes)(const float* projections, size_t num_rows, int num_tables, int num_bits,
                     uint16_t* codes);
  void (*log_u)(const InclusionTable& table, const float* cosine, size_t size, float* out);
  /// Tokens of a segment with at least min_matches equal codes. query_codes: [num_heads][L].
  /// counters: [segment_tokens], zero on entry and on return.
  void (*match_segment)(const SegmentView& segment, const uint16_t* query_codes, int num_heads,
                        int min_matches, uint8_t* counters, MatchBits bits);
  /// The same from the codes themselves: tiles [num_tiles][L][32].
  void (*match_tiles)(const uint16_t* tiles, int num_tiles, int num_tables,
                      const uint16_t* query_codes, int num_heads, int min_matches, MatchBits bits);
  /// Adds rows to the running softmax of each head.
  void (*attend)(const AttendArgs& args);
};

namespace portable {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_vpopcnt {
extern const Kernels kernels;
}
#endif

/// The kernels of an available ISA.
const Kernels& kernels_of(Isa isa);

}  // namespace magicpig
