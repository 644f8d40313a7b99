// What each instruction set provides: sampled_attention.inl, compiled once per ISA.
#pragma once

#include "magicpig.h"
#include "signatures.h"

namespace magicpig {

/// Tokens that a group of query heads matches, relative to a first one.
///
/// Scores are uint8, so that 32 fit a vector: a token's number of equal tables.
struct Matches {
  uint32_t* words;     // bit i of word w of a head: token 32 w + i
  size_t head_stride;  // words from one head to the next
  uint8_t* scores;     // of the tokens whose bits are set, in their order; null: not wanted
  size_t score_stride;
  size_t* num_scores;  // [num_heads], counted on
};

/// How the rows of a sample are weighted; all of one query head. See Threshold.
struct Weighting {
  const float* g_at;     // InclusionTable::g(threshold.matches)
  const float* g_above;  // and of one match more
  float power_at;        // what multiplies log p beside g_at
  float num_bits;        // and how much more beside g_above
  float fraction;
  const float* center;  // [head_size]
  float query_norm;
  float query_dot_center;
};

/// Without what only the caller knows: the centre and the query's norms.
inline Weighting weighting_of(const InclusionTable& table, Threshold threshold) {
  const int t = threshold.matches;
  const float bits = static_cast<float>(table.num_bits());
  return {table.g(t),
          table.g(t + 1),
          static_cast<float>(t) * bits,
          bits,
          threshold.fraction,
          nullptr,
          0.0f,
          0.0f};
}

/// The running softmax of one query head over the rows seen so far.
struct Softmax {
  float max;  // kNoMax before the first row
  float sum;  // of exp(logit - max)
};
/// Finite, so that the difference of two maxima is never inf - inf.
constexpr float kNoMax = -1e30f;

/// Of the rows that one query head was listed with chances u below 1: what its error bar needs.
///
/// c = exp(2 (logit - max)) (1 - u) of the softmax's max, where the logit has -log u in it: with
/// w = 1 / u and e of the logit without it, c / sum^2 is w (w - 1) e^2 / Z^2.
struct ErrorSums {
  float weight;  // sum of c
  float square;  // sum of c |V|^2
};

struct AttendArgs {
  RowType row_type;
  int head_size;
  float scale;
  const uint8_t* const* rows;  // K, then V
  int num_rows;
  int num_rows_ahead;    // pointers behind those, which the caller attends to next: prefetched only
  int num_rows_fetched;  // pointers before those, which the caller attended to just now
  const float* queries;  // [num_heads][head_size]
  int num_heads;
  const Weighting* weighting;  // null: every row has u = 1; else num_heads is 1
  const float* costs;          // -log u of each row, kMaxLanes more may be read; null: likewise 1
  Softmax* softmax;            // [num_heads]
  float* acc;                  // [num_heads][head_size], sum of exp(logit - max) * V
  ErrorSums* errors;           // [num_heads]; null: not wanted, as without costs
  float* error_acc;            // [num_heads][head_size], sum of c V; of errors
};

/// What SimHash::hash needs (hashing.cpp).
struct HashPlan {
  int head_size;
  int size;  // of the transform
  int num_bits;
  int num_tables;
  const float* signs;  // [3 + blocks][size], 1 or -1
};
/// Vectors that are transformed together at most, one in each lane.
constexpr int kMaxLanes = 16;
constexpr int kMaxTransform = SimHash::kMaxSize;

/// What a block's scores and a head have in common: a score is (sum << shift) times F times
/// multiplier, times 2^exponent (signature_scores.multipliers); offset is added to it.
struct SignatureScale {
  int16_t multiplier;
  int16_t exponent;
  int16_t offset;
};

/// A run of blocks to scan for a group of heads.
struct SignatureScan {
  const SignatureLayout* layout;
  const int8_t* entries;  // [size / 4][num_heads][16], of signature_tables
  int num_heads;
  const uint8_t* const* blocks;  // [num_blocks]
  int num_blocks;
  const SignatureScale* scales;  // [num_blocks][num_heads]
  int16_t* asked;                // [num_blocks][2][64], in their places
};

/// Tiles of a scan whose tokens may be listed.
struct SignatureChoice {
  const int16_t* asked;  // [num_tiles][64], in their places
  const int16_t* noise;  // [num_tiles][64], likewise
  int num_tiles;
  int first_token;    // of the first tile
  TokenRange tokens;  // what may be listed
  int log_scale;      // log C
  int floor;
  int32_t* listed;       // tokens, ascending; 64 more than are listed may be written
  int16_t* log_chances;  // of these
};

struct Kernels {
  /// Codes of vectors [num_vectors][head_size], each less the centre of its head,
  /// where centers [num_heads][head_size] are given: vector i is of head (first_head + i) %
  /// num_heads.
  void (*hash)(const HashPlan& plan, const float* vectors, size_t num_vectors, const float* centers,
               size_t num_heads, size_t first_head, uint16_t* codes);
  void (*pack_codes)(const float* projections, size_t num_rows, int num_tables, int num_bits,
                     uint16_t* codes);
  void (*log_u)(const Weighting& weighting, const float* cosine, size_t size, float* out);
  /// Tokens of a segment that reach min_matches. query_codes: [num_heads][L]; counters:
  /// [segment_tokens], zero on entry and on return.
  void (*match_segment)(const SegmentView& segment, const uint16_t* query_codes, int num_heads,
                        int min_matches, uint8_t* counters, const Matches& matches);
  /// The same from the codes themselves: tiles [num_tiles][L][32].
  void (*match_tiles)(const uint16_t* tiles, int num_tiles, int num_tables,
                      const uint16_t* query_codes, int num_heads, int min_matches,
                      const Matches& matches);
  /// The tokens whose bits are set, ascending, and how many: bit i of word w is first + 32 w + i.
  /// tokens: [32 num_words], all of which may be written.
  int (*list_tokens)(const uint32_t* words, int num_words, int32_t first, int32_t* tokens);
  /// Adds rows to the running softmax of each head.
  void (*attend)(const AttendArgs& args);
  /// One block of signatures: keys of its first token and on, one each `stride` bytes; signs:
  /// [2][size], the second over size; block: [layout.block_bytes()], its padding left as it is.
  void (*encode_signatures)(const SignatureLayout& layout, RowType type, const float* signs,
                            const uint8_t* keys, size_t stride, uint8_t* block);
  /// signature_scores.tables of queries [num_heads][head_size]: entries [size / 4][num_heads][16],
  /// units [num_heads].
  void (*signature_tables)(const SignatureLayout& layout, const float* signs, const float* queries,
                           int num_heads, int8_t* entries, float* units);
  /// signature_scores.rounded products of queries and the first head_size elements of rows:
  /// [num_heads][num_rows].
  void (*row_products)(RowType type, int head_size, const uint8_t* const* rows, int num_rows,
                       const float* queries, int num_heads, int32_t* products);
  /// Scores of a tile, without offsets: [num_heads][64], in their places.
  void (*signature_scores)(const SignatureLayout& layout, const int8_t* entries, int num_heads,
                           const uint8_t* tile, const SignatureScale* scales, int16_t* scores);
  /// signature_scores.sum_of_powers of units - top, which is none of them above; and beyond the
  /// last up to a multiple of 32 the least power.
  float (*sum_of_powers)(const int16_t* units, int size, int top);
  /// Sum of squares over tiles of scores, each `stride` numbers from the next.
  int64_t (*squares_of_scores)(const int16_t* scores, size_t stride, int num_tiles);
  /// A tile's scores times multiplier / 2^15, plus offset: z [64]; returns the largest.
  int (*shrink_scores)(const int16_t* scores, int multiplier, int offset, int16_t* z);
  /// A of every token: the largest over heads of score + offset.
  void (*signature_scan)(const SignatureScan& scan);
  /// How many tokens are listed.
  int (*signature_choose)(const SignatureChoice& choice);
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
