// A tile of 64 tokens as bytes and as 16-bit numbers: the vocabulary of signature_scan.inl, written
// once per instruction set and included like simd.h.
//
// Bytes of a tile are in the order of its tokens, 16-bit numbers in their places (signature_place):
// interleaving two tiles of bytes gives the one from the other.

/// Keeps the compiler from reordering sums of table entries, which it then spills.
#if defined(__GNUC__) && !defined(MAGICPIG_SIMDE)
#define MAGICPIG_PIN(x) asm("" : "+x"(x))
#else
#define MAGICPIG_PIN(x) (void)0
#endif

/// What must not be left in memory between two calls.
#if defined(__GNUC__)
#define MAGICPIG_INLINE __attribute__((always_inline)) inline
#else
#define MAGICPIG_INLINE inline
#endif

#if defined(MAGICPIG_SIMD_AVX2)

struct ByteTile {
  __m256i v[2];
};
struct ShortTile {
  __m256i v[4];
};
/// 16 entries, as often as a vector has them.
struct EntryTable {
  __m256i v;
};

MAGICPIG_INLINE ByteTile zero_bytes() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
MAGICPIG_INLINE ByteTile load_bytes(const uint8_t* p) {
  return {{_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1)}};
}
MAGICPIG_INLINE ByteTile low_nibbles(const ByteTile& x) {
  const __m256i nibble = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(x.v[0], nibble), _mm256_and_si256(x.v[1], nibble)}};
}
MAGICPIG_INLINE ByteTile high_nibbles(const ByteTile& x) {
  const __m256i nibble = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(_mm256_srli_epi16(x.v[0], 4), nibble),
           _mm256_and_si256(_mm256_srli_epi16(x.v[1], 4), nibble)}};
}
MAGICPIG_INLINE EntryTable load_entries(const int8_t* p) {
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
/// sums += table[index]
MAGICPIG_INLINE void add_entries(ByteTile& sums, const EntryTable& table, const ByteTile& index) {
#pragma GCC unroll 4
  for (int i = 0; i < 2; ++i) {
    sums.v[i] = _mm256_add_epi8(sums.v[i], _mm256_shuffle_epi8(table.v, index.v[i]));
    MAGICPIG_PIN(sums.v[i]);
  }
}
/// a * weights[0] + b * weights[1], in 16 bits.
MAGICPIG_INLINE ShortTile weighted_sum(const ByteTile& a, const ByteTile& b, int weight_a,
                                       int weight_b) {
  const __m256i weights = _mm256_set1_epi16(static_cast<short>(weight_a | weight_b << 8));
  ShortTile sums;
#pragma GCC unroll 4
  for (int i = 0; i < 2; ++i) {
    sums.v[i] = _mm256_maddubs_epi16(weights, _mm256_unpacklo_epi8(a.v[i], b.v[i]));
    sums.v[2 + i] = _mm256_maddubs_epi16(weights, _mm256_unpackhi_epi8(a.v[i], b.v[i]));
  }
  return sums;
}

#define MAGICPIG_SHORTS(expression)                                               \
  ShortTile result;                                                               \
  _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i) result.v[i] = (expression); \
  return result

MAGICPIG_INLINE ShortTile load_shorts(const void* p) {
  MAGICPIG_SHORTS(_mm256_loadu_si256(static_cast<const __m256i*>(p) + i));
}
MAGICPIG_INLINE void store_shorts(int16_t* p, const ShortTile& x) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + i, x.v[i]);
}
MAGICPIG_INLINE ShortTile all_shorts(int x) {
  MAGICPIG_SHORTS(_mm256_set1_epi16(static_cast<short>(x)));
}
MAGICPIG_INLINE ShortTile add(const ShortTile& a, const ShortTile& b) {
  MAGICPIG_SHORTS(_mm256_add_epi16(a.v[i], b.v[i]));
}
MAGICPIG_INLINE ShortTile add_saturated(const ShortTile& a, const ShortTile& b) {
  MAGICPIG_SHORTS(_mm256_adds_epi16(a.v[i], b.v[i]));
}
MAGICPIG_INLINE ShortTile maximum(const ShortTile& a, const ShortTile& b) {
  MAGICPIG_SHORTS(_mm256_max_epi16(a.v[i], b.v[i]));
}
MAGICPIG_INLINE ShortTile shift_left(const ShortTile& a, int bits) {
  const __m128i count = _mm_cvtsi32_si128(bits);
  MAGICPIG_SHORTS(_mm256_sll_epi16(a.v[i], count));
}
MAGICPIG_INLINE ShortTile rounded_product(const ShortTile& a, const ShortTile& b) {
  MAGICPIG_SHORTS(_mm256_mulhrs_epi16(a.v[i], b.v[i]));
}
#undef MAGICPIG_SHORTS
/// A bit for each token, in their order, that is above 0.
MAGICPIG_INLINE uint64_t positive_tokens(const ShortTile& x) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i above[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) above[i] = _mm256_cmpgt_epi16(x.v[i], zero);
  const uint32_t low =
      static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(above[0], above[2])));
  const uint32_t high =
      static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(above[1], above[3])));
  return static_cast<uint64_t>(high) << 32 | low;
}
MAGICPIG_INLINE int largest(const ShortTile& x) {
  const __m256i m =
      _mm256_max_epi16(_mm256_max_epi16(x.v[0], x.v[1]), _mm256_max_epi16(x.v[2], x.v[3]));
  __m128i n = _mm_max_epi16(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  n = _mm_max_epi16(n, _mm_shuffle_epi32(n, _MM_SHUFFLE(1, 0, 3, 2)));
  n = _mm_max_epi16(n, _mm_shuffle_epi32(n, _MM_SHUFFLE(2, 3, 0, 1)));
  n = _mm_max_epi16(n, _mm_shufflelo_epi16(n, _MM_SHUFFLE(2, 3, 0, 1)));
  return static_cast<int16_t>(_mm_extract_epi16(n, 0));
}
/// Sum of x^2; no element is -32768.
MAGICPIG_INLINE int64_t sum_of_squares(const ShortTile& x) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i sum = zero;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i pairs = _mm256_madd_epi16(x.v[i], x.v[i]);  // below 2^31
    sum = _mm256_add_epi64(sum, _mm256_unpacklo_epi32(pairs, zero));
    sum = _mm256_add_epi64(sum, _mm256_unpackhi_epi32(pairs, zero));
  }
  const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  return _mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1);
}
/// parts[i] += 2^(x / 128), linear between powers of two, of elements i and 32 + i.
inline void add_powers(const ShortTile& x, float* parts) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half) {
      const __m128i low =
          half == 0 ? _mm256_castsi256_si128(x.v[i]) : _mm256_extracti128_si256(x.v[i], 1);
      const __m256i biased =
          _mm256_add_epi32(_mm256_cvtepi16_epi32(low), _mm256_set1_epi32(127 << 7));
      float* part = parts + (i % 2) * 16 + half * 8;
      const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(biased, 16));
      _mm256_storeu_ps(part, _mm256_add_ps(_mm256_loadu_ps(part), power));
    }
}

#elif defined(MAGICPIG_SIMD_AVX512)

struct ByteTile {
  __m512i v;
};
struct ShortTile {
  __m512i v[2];
};
struct EntryTable {
  __m512i v;
};

MAGICPIG_INLINE ByteTile zero_bytes() { return {_mm512_setzero_si512()}; }
MAGICPIG_INLINE ByteTile load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
MAGICPIG_INLINE ByteTile low_nibbles(const ByteTile& x) {
  return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))};
}
MAGICPIG_INLINE ByteTile high_nibbles(const ByteTile& x) {
  return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))};
}
MAGICPIG_INLINE EntryTable load_entries(const int8_t* p) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
MAGICPIG_INLINE void add_entries(ByteTile& sums, const EntryTable& table, const ByteTile& index) {
  sums.v = _mm512_add_epi8(sums.v, _mm512_shuffle_epi8(table.v, index.v));
}
MAGICPIG_INLINE ShortTile weighted_sum(const ByteTile& a, const ByteTile& b, int weight_a,
                                       int weight_b) {
  const __m512i weights = _mm512_set1_epi16(static_cast<short>(weight_a | weight_b << 8));
  return {{_mm512_maddubs_epi16(weights, _mm512_unpacklo_epi8(a.v, b.v)),
           _mm512_maddubs_epi16(weights, _mm512_unpackhi_epi8(a.v, b.v))}};
}
MAGICPIG_INLINE ShortTile load_shorts(const void* p) {
  const uint8_t* const bytes = static_cast<const uint8_t*>(p);
  return {{_mm512_loadu_si512(bytes), _mm512_loadu_si512(bytes + 64)}};
}
MAGICPIG_INLINE void store_shorts(int16_t* p, const ShortTile& x) {
  _mm512_storeu_si512(p, x.v[0]);
  _mm512_storeu_si512(p + 32, x.v[1]);
}
MAGICPIG_INLINE ShortTile all_shorts(int x) {
  const __m512i v = _mm512_set1_epi16(static_cast<short>(x));
  return {{v, v}};
}
MAGICPIG_INLINE ShortTile add(const ShortTile& a, const ShortTile& b) {
  return {{_mm512_add_epi16(a.v[0], b.v[0]), _mm512_add_epi16(a.v[1], b.v[1])}};
}
MAGICPIG_INLINE ShortTile add_saturated(const ShortTile& a, const ShortTile& b) {
  return {{_mm512_adds_epi16(a.v[0], b.v[0]), _mm512_adds_epi16(a.v[1], b.v[1])}};
}
MAGICPIG_INLINE ShortTile maximum(const ShortTile& a, const ShortTile& b) {
  return {{_mm512_max_epi16(a.v[0], b.v[0]), _mm512_max_epi16(a.v[1], b.v[1])}};
}
MAGICPIG_INLINE ShortTile shift_left(const ShortTile& a, int bits) {
  const __m128i count = _mm_cvtsi32_si128(bits);
  return {{_mm512_sll_epi16(a.v[0], count), _mm512_sll_epi16(a.v[1], count)}};
}
MAGICPIG_INLINE ShortTile rounded_product(const ShortTile& a, const ShortTile& b) {
  return {{_mm512_mulhrs_epi16(a.v[0], b.v[0]), _mm512_mulhrs_epi16(a.v[1], b.v[1])}};
}
MAGICPIG_INLINE uint64_t positive_tokens(const ShortTile& x) {
  return _mm512_cmpgt_epi8_mask(_mm512_packs_epi16(x.v[0], x.v[1]), _mm512_setzero_si512());
}
MAGICPIG_INLINE int largest(const ShortTile& x) {
  const __m512i m = _mm512_max_epi16(x.v[0], x.v[1]);
  const __m256i h = _mm256_max_epi16(_mm512_castsi512_si256(m), _mm512_extracti64x4_epi64(m, 1));
  __m128i n = _mm_max_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  n = _mm_max_epi16(n, _mm_shuffle_epi32(n, _MM_SHUFFLE(1, 0, 3, 2)));
  n = _mm_max_epi16(n, _mm_shuffle_epi32(n, _MM_SHUFFLE(2, 3, 0, 1)));
  n = _mm_max_epi16(n, _mm_shufflelo_epi16(n, _MM_SHUFFLE(2, 3, 0, 1)));
  return static_cast<int16_t>(_mm_extract_epi16(n, 0));
}
MAGICPIG_INLINE int64_t sum_of_squares(const ShortTile& x) {
  const __m512i zero = _mm512_setzero_si512();
  __m512i sum = zero;
#pragma GCC unroll 4
  for (int i = 0; i < 2; ++i) {
    const __m512i pairs = _mm512_madd_epi16(x.v[i], x.v[i]);  // below 2^31
    sum = _mm512_add_epi64(sum, _mm512_unpacklo_epi32(pairs, zero));
    sum = _mm512_add_epi64(sum, _mm512_unpackhi_epi32(pairs, zero));
  }
  const __m256i halves =
      _mm256_add_epi64(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
  const __m128i half =
      _mm_add_epi64(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  return _mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1);
}
inline void add_powers(const ShortTile& x, float* parts) {
#pragma GCC unroll 4
  for (int i = 0; i < 2; ++i)
    for (int half = 0; half < 2; ++half) {
      const __m256i low =
          half == 0 ? _mm512_castsi512_si256(x.v[i]) : _mm512_extracti64x4_epi64(x.v[i], 1);
      const __m512i biased =
          _mm512_add_epi32(_mm512_cvtepi16_epi32(low), _mm512_set1_epi32(127 << 7));
      const __m512 power = _mm512_castsi512_ps(_mm512_slli_epi32(biased, 16));
      float* part = parts + half * 16;
      _mm512_storeu_ps(part, _mm512_add_ps(_mm512_loadu_ps(part), power));
    }
}

#else  // portable

struct ByteTile {
  uint8_t v[64];
};
struct ShortTile {
  int16_t v[64];
};
struct EntryTable {
  const int8_t* v;
};

inline int clamped_short(int x) { return x < -32768 ? -32768 : x > 32767 ? 32767 : x; }

MAGICPIG_INLINE ByteTile zero_bytes() { return {}; }
MAGICPIG_INLINE ByteTile load_bytes(const uint8_t* p) {
  ByteTile tile;
  memcpy(tile.v, p, sizeof tile.v);
  return tile;
}
MAGICPIG_INLINE ByteTile low_nibbles(ByteTile x) {
  for (int i = 0; i < 64; ++i) x.v[i] &= 15;
  return x;
}
MAGICPIG_INLINE ByteTile high_nibbles(ByteTile x) {
  for (int i = 0; i < 64; ++i) x.v[i] >>= 4;
  return x;
}
MAGICPIG_INLINE EntryTable load_entries(const int8_t* p) { return {p}; }
MAGICPIG_INLINE void add_entries(ByteTile& sums, const EntryTable& table, const ByteTile& index) {
  for (int i = 0; i < 64; ++i)
    sums.v[i] = static_cast<uint8_t>(sums.v[i] + static_cast<uint8_t>(table.v[index.v[i]]));
}
MAGICPIG_INLINE ShortTile weighted_sum(const ByteTile& a, const ByteTile& b, int weight_a,
                                       int weight_b) {
  ShortTile sums;
  for (int t = 0; t < 64; ++t)
    sums.v[signature_place(t)] = static_cast<int16_t>(static_cast<int8_t>(a.v[t]) * weight_a +
                                                      static_cast<int8_t>(b.v[t]) * weight_b);
  return sums;
}

#define MAGICPIG_SHORTS(expression)                                            \
  ShortTile result;                                                            \
  for (int i = 0; i < 64; ++i) result.v[i] = static_cast<int16_t>(expression); \
  return result

MAGICPIG_INLINE ShortTile load_shorts(const void* p) {
  ShortTile tile;
  memcpy(tile.v, p, sizeof tile.v);
  return tile;
}
MAGICPIG_INLINE void store_shorts(int16_t* p, const ShortTile& x) { memcpy(p, x.v, sizeof x.v); }
MAGICPIG_INLINE ShortTile all_shorts(int x) { MAGICPIG_SHORTS(x); }
MAGICPIG_INLINE ShortTile add(const ShortTile& a, const ShortTile& b) {
  MAGICPIG_SHORTS(a.v[i] + b.v[i]);
}
MAGICPIG_INLINE ShortTile add_saturated(const ShortTile& a, const ShortTile& b) {
  MAGICPIG_SHORTS(clamped_short(a.v[i] + b.v[i]));
}
MAGICPIG_INLINE ShortTile maximum(const ShortTile& a, const ShortTile& b) {
  MAGICPIG_SHORTS(a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
MAGICPIG_INLINE ShortTile shift_left(const ShortTile& a, int bits) {
  MAGICPIG_SHORTS(a.v[i] * (1 << bits));
}
MAGICPIG_INLINE ShortTile rounded_product(const ShortTile& a, const ShortTile& b) {
  MAGICPIG_SHORTS(((a.v[i] * b.v[i] >> 14) + 1) >> 1);
}
#undef MAGICPIG_SHORTS
MAGICPIG_INLINE uint64_t positive_tokens(const ShortTile& x) {
  uint64_t bits = 0;
  for (int t = 0; t < 64; ++t) bits |= static_cast<uint64_t>(x.v[signature_place(t)] > 0) << t;
  return bits;
}
MAGICPIG_INLINE int largest(const ShortTile& x) {
  int most = x.v[0];
  for (int i = 1; i < 64; ++i) most = x.v[i] > most ? x.v[i] : most;
  return most;
}
MAGICPIG_INLINE int64_t sum_of_squares(const ShortTile& x) {
  int64_t sum = 0;
  for (int i = 0; i < 64; ++i) sum += x.v[i] * x.v[i];
  return sum;
}
inline void add_powers(const ShortTile& x, float* parts) {
  for (int i = 0; i < 64; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x.v[i] + (127 << 7)) << 16;
    float power;
    memcpy(&power, &bits, sizeof power);
    parts[i % 32] += power;
  }
}

#endif
