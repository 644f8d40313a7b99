// Scores of signatures and the choice by them: the exact twin of vllm_magicpig/signature_scores.py.
//
// Included after signature_encode.inl in the namespace of each ISA. Floats are single operations in
// the order that the twin states, never multiply_add; all else is integers.
#include "simd_tile.h"

/// 16 partial sums over dimensions.
struct Sum16 {
  static constexpr int kParts = 16 / kLanes;
  Vec parts[kParts];

  Sum16() {
    for (Vec& part : parts) part = broadcast(0.0f);
  }
  void add(int j, Vec terms) {
    Vec& part = parts[j / kLanes % kParts];
    part = part + terms;
  }
  float total() const {
    if constexpr (kParts == 2) return sum_lanes(parts[0] + parts[1]);
    return sum_lanes(parts[0]);
  }
};

/// y = H (signs * y), by vectors of dimensions.
inline void rotate_row(float* y, const float* signs, int size) {
  for (int j = 0; j < size; j += kLanes)
    store(y + j, butterflies_of_lanes(load(y + j) * load(signs + j)));
  transform(y, size / kLanes);
}

/// The largest sum of 64 |q_j| is so many units of a table.
constexpr float kTableTop = 118.0f;
constexpr float kMostUnits = 1 << 23;

inline int clamped(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// ----------------------------------------------------------------------------------------- tables

/// What a row of four dimensions adds at most, |q_0| + |q_1| + |q_2| + |q_3|.
inline float nibble_size(const float* q) {
  return (__builtin_fabsf(q[0]) + __builtin_fabsf(q[1])) +
         (__builtin_fabsf(q[2]) + __builtin_fabsf(q[3]));
}

inline int8_t table_entry(const float* q, int signs, float inverse) {
  const float a = signs & 1 ? q[0] : -q[0], b = signs & 2 ? q[1] : -q[1];
  const float c = signs & 4 ? q[2] : -q[2], d = signs & 8 ? q[3] : -q[3];
  const float units = ((a + b) + (c + d)) * inverse;
  const float nearest = (units + 12582912.0f) - 12582912.0f;  // half to even
  // NaN becomes -127.
  return static_cast<int8_t>(nearest >= -127.0f ? (nearest <= 127.0f ? nearest : 127.0f) : -127.0f);
}

void signature_tables(const SignatureLayout& layout, const float* signs, const float* queries,
                      int num_heads, int8_t* entries, float* units) {
  alignas(64) float q[kMaxTransform];
  const int num_nibbles = layout.size / 4, of_sum = layout.sum_dimensions() / 4;
  for (int h = 0; h < num_heads; ++h) {
    memset(q, 0, sizeof q);
    memcpy(q, queries + static_cast<size_t>(h) * layout.head_size,
           static_cast<size_t>(layout.head_size) * sizeof(float));
    rotate_row(q, signs, layout.size);
    rotate_row(q, signs + layout.size, layout.size);
    float most = 0.0f;
    for (int first = 0; first < num_nibbles; first += of_sum) {
      float sum = nibble_size(q + 4 * first);
      for (int n = first + 1; n < first + of_sum; ++n) sum += nibble_size(q + 4 * n);
      most = sum > most ? sum : most;
    }
    units[h] = most / kTableTop;
    const float inverse = most > 0.0f ? 1.0f / units[h] : 0.0f;
    for (int n = 0; n < num_nibbles; ++n)
      for (int v = 0; v < 16; ++v)
        entries[(n * num_heads + h) * 16 + v] = table_entry(q + 4 * n, v, inverse);
  }
}

// ----------------------------------------------------------------------------------- exact logits

inline int32_t rounded_units(float x) {
  const float clipped = x >= -kMostUnits ? (x <= kMostUnits ? x : kMostUnits) : -kMostUnits;
  return static_cast<int32_t>(__builtin_lrintf(clipped));
}

template <class Element, int kHeads>
inline void products_of_heads(int head_size, const uint8_t* const* rows, int num_rows,
                              const float* queries, int32_t* products) {
  for (int r = 0; r < num_rows; ++r) {
    if (r + 8 < num_rows)
      prefetch_lines(rows[r + 8], static_cast<size_t>(head_size) * Element::kBytes);
    Sum16 sums[kHeads];
    for_each_vector(head_size, [&](int d, auto lanes) {
      const Vec k = load_row(Element{}, rows[r] + d * Element::kBytes, lanes);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) sums[h].add(d, k * load(queries + h * head_size + d, lanes));
    });
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) products[h * num_rows + r] = rounded_units(sums[h].total());
  }
}

template <class Element>
inline void products_of(int head_size, const uint8_t* const* rows, int num_rows,
                        const float* queries, int num_heads, int32_t* products) {
  int h = 0;
  for (; h + 4 <= num_heads; h += 4)
    products_of_heads<Element, 4>(head_size, rows, num_rows, queries + h * head_size,
                                  products + h * num_rows);
  for (; h < num_heads; ++h)
    products_of_heads<Element, 1>(head_size, rows, num_rows, queries + h * head_size,
                                  products + h * num_rows);
}

void row_products(RowType type, int head_size, const uint8_t* const* rows, int num_rows,
                  const float* queries, int num_heads, int32_t* products) {
  switch (type) {
    case RowType::float32:
      return products_of<Float32>(head_size, rows, num_rows, queries, num_heads, products);
    case RowType::bfloat16:
      return products_of<BFloat16>(head_size, rows, num_rows, queries, num_heads, products);
    case RowType::float16:
      return products_of<Float16>(head_size, rows, num_rows, queries, num_heads, products);
  }
}

// ----------------------------------------------------------------------------------------- scores

/// Adds the table entries of a plane of bits, for heads one after another.
template <int kHeads>
MAGICPIG_INLINE void plane_sums(const uint8_t* codes, int bytes, const int8_t* entries,
                                size_t stride, ByteTile (&to)[kHeads]) {
  ByteTile sums[kHeads];  // in registers
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) sums[h] = zero_bytes();
  for (int byte = 0; byte < bytes; ++byte, codes += kSignatureTile) {
    const ByteTile code = load_bytes(codes);
    const ByteTile low = low_nibbles(code);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) add_entries(sums[h], load_entries(entries + 16 * h), low);
    entries += stride;
    const ByteTile high = high_nibbles(code);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) add_entries(sums[h], load_entries(entries + 16 * h), high);
    entries += stride;
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) to[h] = sums[h];
}

/// signature_scores.table_sums of a tile, shifted; entries: of the first head.
template <int kBits, int kHeads>
MAGICPIG_INLINE void tile_sums(const SignatureLayout& layout, const int8_t* entries, size_t stride,
                               const uint8_t* tile, ShortTile (&sums)[kHeads]) {
  const int bytes = layout.sum_dimensions() / 8;
  const int num_sums = layout.size / layout.sum_dimensions();
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) sums[h] = all_shorts(0);
  for (int s = 0; s < num_sums; ++s) {
    ByteTile planes[kBits][kHeads];  // the highest bit first
#pragma GCC unroll 4
    for (int bit = 0; bit < kBits; ++bit, tile += bytes * kSignatureTile)
      plane_sums<kHeads>(tile, bytes, entries, stride, planes[bit]);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      ShortTile sum;
      if constexpr (kBits == 1)
        sum = weighted_sum(planes[0][h], zero_bytes(), 1, 0);
      else if constexpr (kBits == 2)
        sum = weighted_sum(planes[0][h], planes[1][h], 2, 1);
      else
        sum = add(weighted_sum(planes[0][h], planes[1][h], 8, 4),
                  weighted_sum(planes[2][h], planes[3][h], 2, 1));
      sums[h] = add(sums[h], sum);
    }
    entries += static_cast<size_t>(2 * bytes) * stride;
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) sums[h] = shift_left(sums[h], layout.sum_shift());
}

MAGICPIG_INLINE ShortTile scaled(ShortTile sums, const ShortTile& factors, SignatureScale scale) {
  const ShortTile factor = rounded_product(factors, all_shorts(scale.multiplier));
  ShortTile score = rounded_product(sums, factor);
  if (scale.exponent == 0) return score;
  for (int e = 0; e < scale.exponent; ++e) score = add_saturated(score, score);
  return maximum(score, all_shorts(-32767));
}

template <int kBits, int kHeads>
MAGICPIG_INLINE void scores_of_heads(const SignatureLayout& layout, const int8_t* entries,
                                     size_t stride, const uint8_t* tile,
                                     const SignatureScale* scales, ShortTile (&scores)[kHeads]) {
  tile_sums<kBits, kHeads>(layout, entries, stride, tile, scores);
  const ShortTile factors = load_shorts(tile + layout.tile_bytes() - 2 * kSignatureTile);
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) scores[h] = scaled(scores[h], factors, scales[h]);
}

/// Calls body(integral_constant of heads, first head) for as many heads at once as registers hold.
template <int kHeads>
struct Heads {
  static constexpr int kCount = kHeads;
};
template <class Body>
inline void for_heads(int num_heads, const Body& body) {
  int head = 0;
  for (; head + 4 <= num_heads; head += 4) body(Heads<4>{}, head);
  if (head + 2 <= num_heads) {
    body(Heads<2>{}, head);
    head += 2;
  }
  if (head < num_heads) body(Heads<1>{}, head);
}

template <int kBits>
inline void scores_of(const SignatureLayout& layout, const int8_t* entries, int num_heads,
                      const uint8_t* tile, const SignatureScale* scales, int16_t* scores) {
  for_heads(num_heads, [&](auto heads, int head) {
    constexpr int kHeads = decltype(heads)::kCount;
    ShortTile found[kHeads];
    scores_of_heads<kBits, kHeads>(layout, entries + 16 * head, 16 * static_cast<size_t>(num_heads),
                                   tile, scales + head, found);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) store_shorts(scores + (head + h) * kSignatureTile, found[h]);
  });
}

void signature_scores(const SignatureLayout& layout, const int8_t* entries, int num_heads,
                      const uint8_t* tile, const SignatureScale* scales, int16_t* scores) {
  switch (layout.bits) {
    case 1:
      return scores_of<1>(layout, entries, num_heads, tile, scales, scores);
    case 2:
      return scores_of<2>(layout, entries, num_heads, tile, scales, scores);
    default:
      return scores_of<4>(layout, entries, num_heads, tile, scales, scores);
  }
}

// ------------------------------------------------------------------------------------------- scan

/// A of a tile over some heads, and of what is there already.
template <int kBits, int kHeads>
MAGICPIG_INLINE void scan_tile(const SignatureScan& scan, int head, const uint8_t* tile,
                               const SignatureScale* scales, int16_t* asked) {
  ShortTile scores[kHeads];
  scores_of_heads<kBits, kHeads>(*scan.layout, scan.entries + 16 * head,
                                 16 * static_cast<size_t>(scan.num_heads), tile, scales + head,
                                 scores);
  ShortTile most = add_saturated(scores[0], all_shorts(scales[head].offset));
#pragma GCC unroll 4
  for (int h = 1; h < kHeads; ++h)
    most = maximum(most, add_saturated(scores[h], all_shorts(scales[head + h].offset)));
  store_shorts(asked, head == 0 ? most : maximum(most, load_shorts(asked)));
}

template <int kBits>
inline void scan_of(const SignatureScan& scan) {
  const size_t tile_bytes = scan.layout->tile_bytes();
  int16_t* asked = scan.asked;
  for (int b = 0; b < scan.num_blocks; ++b) {
    const SignatureScale* scales = scan.scales + static_cast<size_t>(b) * scan.num_heads;
    // Blocks lie anywhere: the hardware does not see the next one coming.
    const uint8_t* const next = scan.blocks[b + 1 < scan.num_blocks ? b + 1 : b];
    for (int tile = 0; tile < 2; ++tile, asked += kSignatureTile) {
      prefetch_lines(next + tile * tile_bytes, tile_bytes);
      for_heads(scan.num_heads, [&](auto heads, int head) {
        scan_tile<kBits, decltype(heads)::kCount>(scan, head, scan.blocks[b] + tile * tile_bytes,
                                                  scales, asked);
      });
    }
  }
}

void signature_scan(const SignatureScan& scan) {
  switch (scan.layout->bits) {
    case 1:
      return scan_of<1>(scan);
    case 2:
      return scan_of<2>(scan);
    default:
      return scan_of<4>(scan);
  }
}

// ----------------------------------------------------------------------------------------- powers

/// 2^(units / 128), linear between powers of two: the bits of a bfloat16.
inline float linear_power(int units) {
  const uint32_t bits = static_cast<uint32_t>(units + (127 << 7)) << 16;
  float power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

float sum_of_powers(const int16_t* units, int size, int top) {
  alignas(64) float parts[32] = {};
  const ShortTile shift = all_shorts(top == -32768 ? 32767 : -top), least = all_shorts(kLeastPower);
  int first = 0;
  for (; first + kSignatureTile <= size; first += kSignatureTile)
    add_powers(maximum(add_saturated(load_shorts(units + first), shift), least), parts);
  for (; first < size; first += 32)
    for (int i = 0; i < 32; ++i) {
      const int value = first + i < size ? units[first + i] - top : kLeastPower;
      parts[i] += linear_power(clamped(value, kLeastPower, 0));
    }
  for (int half = 16; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

/// Of tiles of scores [num_tiles], each `stride` numbers from the next.
int64_t squares_of_scores(const int16_t* scores, size_t stride, int num_tiles) {
  int64_t sum = 0;
  for (int i = 0; i < num_tiles; ++i) sum += sum_of_squares(load_shorts(scores + i * stride));
  return sum;
}

/// z of a tile: scores times multiplier / 2^15 plus offset; returns the largest.
int shrink_scores(const int16_t* scores, int multiplier, int offset, int16_t* z) {
  const ShortTile shrunk = rounded_product(load_shorts(scores), all_shorts(multiplier));
  const ShortTile sum = add_saturated(shrunk, all_shorts(offset));
  store_shorts(z, sum);
  return largest(sum);
}

// ----------------------------------------------------------------------------------------- choice

/// Bits of a tile's tokens that lie in the range.
inline uint64_t tokens_in(int first, TokenRange range) {
  uint64_t bits = ~uint64_t{0};
  if (range.begin > first) bits &= bits << (range.begin - first);
  if (range.end < first + kSignatureTile) bits &= ~(~uint64_t{0} << (range.end - first));
  return bits;
}

int signature_choose(const SignatureChoice& choice) {
  // Half of it twice: beyond what 16 bits hold, M is above 0 or at the floor whatever A is.
  const int scale = clamped(choice.log_scale, -65536, 65534);
  const ShortTile half = all_shorts(scale / 2), rest = all_shorts(scale - scale / 2);
  const ShortTile floor = all_shorts(choice.floor);
  int size = 0;
  for (int tile = 0; tile < choice.num_tiles; ++tile) {
    const int at = tile * kSignatureTile;
    const ShortTile scaled_once = add_saturated(load_shorts(choice.asked + at), half);
    const ShortTile chances = maximum(add_saturated(scaled_once, rest), floor);
    uint64_t word = positive_tokens(add_saturated(chances, load_shorts(choice.noise + at)));
    word &= tokens_in(choice.first_token + at, choice.tokens);
    if (word == 0) continue;
    alignas(64) int16_t log_chances[kSignatureTile];
    store_shorts(log_chances, chances);
    for (; word != 0; word &= word - 1, ++size) {
      const int token = __builtin_ctzll(word);
      choice.listed[size] = choice.first_token + at + token;
      choice.log_chances[size] = log_chances[signature_place(token)];
    }
  }
  return size;
}
