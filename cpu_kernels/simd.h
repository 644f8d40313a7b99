// The vectors of sampled_attention.inl: one small vocabulary, written once per instruction set.
//
// Included by sampled_attention.inl, inside the namespace of an ISA and after its target pragma:
// hence no includes and no include guard. Another ISA adds a branch that defines the same names
// (kLanes may differ: the .inl walks arrays in steps of kLanes. Head sizes are multiples of 8, so
// that rows end within a vector for more lanes than that: such an ISA also loads and stores under a
// Mask, which touches nothing beyond its lanes).

/// Row elements, by the name of their type.
struct Float32 {
  static constexpr int kBytes = 4;
};
struct BFloat16 {
  static constexpr int kBytes = 2;
};
struct Float16 {
  static constexpr int kBytes = 2;
};

/// In the place of a Mask: a full vector.
struct AllLanes {};

#if defined(MAGICPIG_SIMD_AVX2)

constexpr int kLanes = 8;

struct Vec {
  __m256 v;
};
struct IntVec {
  __m256i v;
};
struct Mask {
  __m256 v;
};

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline Vec load_row(Float32, const uint8_t* p) {
  return {_mm256_loadu_ps(reinterpret_cast<const float*>(p))};
}
inline Vec load_row(BFloat16, const uint8_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec load_row(Float16, const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
/// a * b + c
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec square_root(Vec x) { return {_mm256_sqrt_ps(x.v)}; }
inline Vec absolute(Vec x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
inline Vec round_nearest(Vec x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
/// Both return b where either is NaN.
inline Vec maximum(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec minimum(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }

/// a < b, false where either is NaN.
inline Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask first_lanes(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
}
inline Vec select(Mask mask, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, mask.v)}; }

inline IntVec truncate(Vec x) { return {_mm256_cvttps_epi32(x.v)}; }
inline Vec to_float(IntVec x) { return {_mm256_cvtepi32_ps(x.v)}; }
inline Vec gather(const float* table, IntVec index) {
  return {_mm256_i32gather_ps(table, index.v, 4)};
}
/// 2^e of an integral e in [-126, 127].
inline Vec power_of_two(Vec e) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(e.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))};
}
/// x = mantissa * 2^exponent with a mantissa in [sqrt(1/2), sqrt(2)); x > 0 and normal.
inline Vec split_exponent(Vec x, Vec* exponent) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
  *exponent = {_mm256_cvtepi32_ps(e)};
  return {_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)))};
}

inline float max_lane(Vec x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline float sum_lanes(Vec x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
/// out[i] = sum of the lanes of x[i].
inline void sum_lanes_of_8(const Vec (&x)[8], float* out) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4].v, x[5].v), _mm256_hadd_ps(x[6].v, x[7].v));
  const __m256 low = _mm256_permute2f128_ps(a, b, 0x20);
  const __m256 high = _mm256_permute2f128_ps(a, b, 0x31);
  _mm256_storeu_ps(out, _mm256_add_ps(low, high));
}

/// a + b in lane i and a - b in lane i + d for a, b of these lanes: d = 1, then 2, then 4.
inline Vec butterflies_of_lanes(Vec x) {
  const __m256 s = _mm256_permute_ps(x.v, _MM_SHUFFLE(2, 3, 0, 1));
  __m256 y = _mm256_blend_ps(_mm256_add_ps(x.v, s), _mm256_sub_ps(s, x.v), 0xaa);
  const __m256 t = _mm256_permute_ps(y, _MM_SHUFFLE(1, 0, 3, 2));
  y = _mm256_blend_ps(_mm256_add_ps(y, t), _mm256_sub_ps(t, y), 0xcc);
  const __m256 u = _mm256_permute2f128_ps(y, y, 1);
  return {_mm256_blend_ps(_mm256_add_ps(y, u), _mm256_sub_ps(u, y), 0xf0)};
}

/// Bit i: x[i] > 0, of 8 floats.
inline uint32_t positive_bits_of_8(const float* x) {
  const __m256 positive = _mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_setzero_ps(), _CMP_GT_OQ);
  return static_cast<uint32_t>(_mm256_movemask_ps(positive));
}

/// uint16 of the 32 tokens of a tile.
struct Tile16 {
  __m256i low, high;
};
inline Tile16 zero_tile() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Tile16 load_tile(const uint16_t* p) {
  const __m256i* v = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
}
/// counts + 1 where codes == code.
inline Tile16 count_equal(Tile16 counts, Tile16 codes, uint16_t code) {
  const __m256i c = _mm256_set1_epi16(static_cast<short>(code));
  return {_mm256_sub_epi16(counts.low, _mm256_cmpeq_epi16(codes.low, c)),
          _mm256_sub_epi16(counts.high, _mm256_cmpeq_epi16(codes.high, c))};
}
inline uint32_t at_least(__m256i counts, int threshold) {
  const __m256i t = _mm256_set1_epi8(static_cast<char>(threshold));
  const __m256i reached = _mm256_cmpeq_epi8(_mm256_max_epu8(counts, t), counts);
  return static_cast<uint32_t>(_mm256_movemask_epi8(reached));
}
inline __m256i bytes_of(Tile16 counts) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi16(counts.low, counts.high), 0xd8);
}
/// Bit i: counts[i] >= threshold; both at most 255.
inline uint32_t at_least(Tile16 counts, int threshold) {
  return at_least(bytes_of(counts), threshold);
}
/// counts as bytes; at most 255 each.
inline void store_bytes(uint8_t* p, Tile16 counts) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes_of(counts));
}
/// The same of 32 byte counters, which are set to zero.
inline uint32_t take_at_least(uint8_t* counters, int threshold) {
  __m256i* v = reinterpret_cast<__m256i*>(counters);
  const uint32_t bits = at_least(_mm256_loadu_si256(v), threshold);
  _mm256_storeu_si256(v, _mm256_setzero_si256());
  return bits;
}

#elif defined(MAGICPIG_SIMD_AVX512)

// Only what SIMDe 0.8.2 has (intrinsics_avx512.h): no reductions, no _mm512_cmpeq_epi16_mask.

constexpr int kLanes = 16;

struct Vec {
  __m512 v;
};
struct IntVec {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, Mask lanes) { return {_mm512_maskz_loadu_ps(lanes.v, p)}; }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, Vec x, Mask lanes) { _mm512_mask_storeu_ps(p, lanes.v, x.v); }

inline Vec load_row(Float32, const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
inline Vec load_row(Float32, const uint8_t* p, Mask lanes) {
  return load(reinterpret_cast<const float*>(p), lanes);
}
inline __m256i load_halves(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline __m256i load_halves(const uint8_t* p, Mask lanes) {
  return _mm256_maskz_loadu_epi16(lanes.v, p);
}
inline Vec widen(BFloat16, __m256i halves) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
inline Vec widen(Float16, __m256i halves) { return {_mm512_cvtph_ps(halves)}; }
inline Vec load_row(BFloat16 type, const uint8_t* p) { return widen(type, load_halves(p)); }
inline Vec load_row(BFloat16 type, const uint8_t* p, Mask lanes) {
  return widen(type, load_halves(p, lanes));
}
inline Vec load_row(Float16 type, const uint8_t* p) { return widen(type, load_halves(p)); }
inline Vec load_row(Float16 type, const uint8_t* p, Mask lanes) {
  return widen(type, load_halves(p, lanes));
}

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec square_root(Vec x) { return {_mm512_sqrt_ps(x.v)}; }
inline Vec absolute(Vec x) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), x.v)}; }
inline Vec round_nearest(Vec x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec maximum(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec minimum(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }

inline Mask less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask first_lanes(int n) {
  return {static_cast<__mmask16>(n < kLanes ? (1u << n) - 1 : 0xffffu)};
}
inline Vec select(Mask mask, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(mask.v, no.v, yes.v)};
}

inline IntVec truncate(Vec x) { return {_mm512_cvttps_epi32(x.v)}; }
inline Vec to_float(IntVec x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline Vec gather(const float* table, IntVec index) {
  return {_mm512_i32gather_ps(index.v, table, 4)};
}
inline Vec power_of_two(Vec e) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(e.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
inline Vec split_exponent(Vec x, Vec* exponent) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  *exponent = {_mm512_cvtepi32_ps(e)};
  return {_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)))};
}

inline __m256 low_half(__m512 x) { return _mm512_castps512_ps256(x); }
inline __m256 high_half(__m512 x) { return _mm512_extractf32x8_ps(x, 1); }
inline float max_lane(Vec x) {
  const __m256 half = _mm256_max_ps(low_half(x.v), high_half(x.v));
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline float sum_lanes(Vec x) {
  const __m256 half = _mm256_add_ps(low_half(x.v), high_half(x.v));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
/// The halves of a and of b, each added up: a's in the low half.
inline __m512 add_halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(1, 0, 1, 0)),
                       _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(3, 2, 3, 2)));
}
/// What _mm512_hadd_ps would be, but for the order of its lanes.
inline __m512 add_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
inline void sum_lanes_of_8(const Vec (&x)[8], float* out) {
  // Of each quarter of these, two belong to x[i] and two to x[i + 4].
  const __m512 x04 = add_halves(x[0].v, x[4].v), x15 = add_halves(x[1].v, x[5].v);
  const __m512 x26 = add_halves(x[2].v, x[6].v), x37 = add_halves(x[3].v, x[7].v);
  const __m512 even = add_pairs(x04, x26), odd = add_pairs(x15, x37);
  const __m512 quarters = add_pairs(even, odd);  // x[0..3], x[0..3], x[4..7], x[4..7]
  const __m512 swapped = _mm512_shuffle_f32x4(quarters, quarters, _MM_SHUFFLE(3, 1, 2, 0));
  _mm256_storeu_ps(out, _mm256_add_ps(low_half(swapped), high_half(swapped)));
}

inline Vec butterflies_of_lanes(Vec x) {
  const __m512 s = _mm512_shuffle_ps(x.v, x.v, _MM_SHUFFLE(2, 3, 0, 1));
  __m512 y = _mm512_mask_sub_ps(_mm512_add_ps(x.v, s), 0xaaaa, s, x.v);
  const __m512 t = _mm512_shuffle_ps(y, y, _MM_SHUFFLE(1, 0, 3, 2));
  y = _mm512_mask_sub_ps(_mm512_add_ps(y, t), 0xcccc, t, y);
  const __m512 u = _mm512_shuffle_f32x4(y, y, _MM_SHUFFLE(2, 3, 0, 1));
  y = _mm512_mask_sub_ps(_mm512_add_ps(y, u), 0xf0f0, u, y);
  const __m512 w = _mm512_shuffle_f32x4(y, y, _MM_SHUFFLE(1, 0, 3, 2));
  return {_mm512_mask_sub_ps(_mm512_add_ps(y, w), 0xff00, w, y)};
}

inline uint32_t positive_bits_of_8(const float* x) {
  return _mm256_cmp_ps_mask(_mm256_loadu_ps(x), _mm256_setzero_ps(), _CMP_GT_OQ);
}

struct Tile16 {
  __m512i v;
};
inline Tile16 zero_tile() { return {_mm512_setzero_si512()}; }
inline Tile16 load_tile(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bytes(uint8_t* p, Tile16 counts) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi16_epi8(counts.v));
}
inline Tile16 count_equal(Tile16 counts, Tile16 codes, uint16_t code) {
  const __mmask32 equal =
      _mm512_cmpeq_epu16_mask(codes.v, _mm512_set1_epi16(static_cast<short>(code)));
  return {_mm512_mask_add_epi16(counts.v, equal, counts.v, _mm512_set1_epi16(1))};
}
inline uint32_t at_least(Tile16 counts, int threshold) {
  return _mm512_cmpge_epu16_mask(counts.v, _mm512_set1_epi16(static_cast<short>(threshold)));
}
inline uint32_t take_at_least(uint8_t* counters, int threshold) {
  __m256i* v = reinterpret_cast<__m256i*>(counters);
  const __m256i t = _mm256_set1_epi8(static_cast<char>(threshold));
  const uint32_t bits = _mm256_cmpge_epu8_mask(_mm256_loadu_si256(v), t);
  _mm256_storeu_si256(v, _mm256_setzero_si256());
  return bits;
}

#else  // portable: plain arrays, for the compiler to vectorise as it can; needs elements.h

constexpr int kLanes = 8;

struct Vec {
  float v[kLanes];
};
struct IntVec {
  int32_t v[kLanes];
};
struct Mask {
  bool v[kLanes];
};

#define MAGICPIG_LANEWISE(Result, expression)                  \
  Result result;                                               \
  for (int i = 0; i < kLanes; ++i) result.v[i] = (expression); \
  return result

inline Vec broadcast(float x) { MAGICPIG_LANEWISE(Vec, x); }
inline Vec load(const float* p) { MAGICPIG_LANEWISE(Vec, p[i]); }
inline void store(float* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = x.v[i];
}
inline Vec load_row(Float32, const uint8_t* p) {
  Vec x;
  memcpy(x.v, p, sizeof x.v);
  return x;
}
inline Vec load_row(BFloat16, const uint8_t* p) {
  uint16_t bits[kLanes];
  memcpy(bits, p, sizeof bits);
  MAGICPIG_LANEWISE(Vec, float_of_bfloat16(bits[i]));
}
inline Vec load_row(Float16, const uint8_t* p) {
  uint16_t bits[kLanes];
  memcpy(bits, p, sizeof bits);
  MAGICPIG_LANEWISE(Vec, float_of_float16(bits[i]));
}

inline Vec operator+(Vec a, Vec b) { MAGICPIG_LANEWISE(Vec, a.v[i] + b.v[i]); }
inline Vec operator-(Vec a, Vec b) { MAGICPIG_LANEWISE(Vec, a.v[i] - b.v[i]); }
inline Vec operator*(Vec a, Vec b) { MAGICPIG_LANEWISE(Vec, a.v[i] * b.v[i]); }
inline Vec operator/(Vec a, Vec b) { MAGICPIG_LANEWISE(Vec, a.v[i] / b.v[i]); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { MAGICPIG_LANEWISE(Vec, a.v[i] * b.v[i] + c.v[i]); }
inline Vec square_root(Vec x) { MAGICPIG_LANEWISE(Vec, sqrtf(x.v[i])); }
inline Vec absolute(Vec x) {
  MAGICPIG_LANEWISE(Vec, float_of_bits(bits_of_float(x.v[i]) & 0x7fffffff));
}
inline Vec round_nearest(Vec x) {
  // Adding 1.5 * 2^23 leaves no bits for a fraction; |x| stays far below 2^22.
  MAGICPIG_LANEWISE(Vec, (x.v[i] + 12582912.0f) - 12582912.0f);
}
inline Vec maximum(Vec a, Vec b) { MAGICPIG_LANEWISE(Vec, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Vec minimum(Vec a, Vec b) { MAGICPIG_LANEWISE(Vec, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }

inline Mask less(Vec a, Vec b) { MAGICPIG_LANEWISE(Mask, a.v[i] < b.v[i]); }
inline Mask first_lanes(int n) { MAGICPIG_LANEWISE(Mask, i < n); }
inline Vec select(Mask mask, Vec yes, Vec no) {
  MAGICPIG_LANEWISE(Vec, mask.v[i] ? yes.v[i] : no.v[i]);
}

inline IntVec truncate(Vec x) { MAGICPIG_LANEWISE(IntVec, static_cast<int32_t>(x.v[i])); }
inline Vec to_float(IntVec x) { MAGICPIG_LANEWISE(Vec, static_cast<float>(x.v[i])); }
inline Vec gather(const float* table, IntVec index) { MAGICPIG_LANEWISE(Vec, table[index.v[i]]); }
inline Vec power_of_two(Vec e) {
  // NaN takes the other branch: it has no integer.
  MAGICPIG_LANEWISE(
      Vec, e.v[i] >= -126
               ? float_of_bits(static_cast<uint32_t>(static_cast<int32_t>(e.v[i]) + 127) << 23)
               : 0.0f);
}
inline Vec split_exponent(Vec x, Vec* exponent) {
  Vec mantissa;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = bits_of_float(x.v[i]);
    const int32_t e = static_cast<int32_t>(bits - 0x3f3504f3) >> 23;
    exponent->v[i] = static_cast<float>(e);
    mantissa.v[i] = float_of_bits(bits - (static_cast<uint32_t>(e) << 23));
  }
  return mantissa;
}
#undef MAGICPIG_LANEWISE

inline float max_lane(Vec x) {
  float m = x.v[0];
  for (int i = 1; i < kLanes; ++i) m = x.v[i] > m ? x.v[i] : m;
  return m;
}
inline float sum_lanes(Vec x) {
  return ((x.v[0] + x.v[4]) + (x.v[2] + x.v[6])) + ((x.v[1] + x.v[5]) + (x.v[3] + x.v[7]));
}
inline void sum_lanes_of_8(const Vec (&x)[8], float* out) {
  for (int i = 0; i < 8; ++i) out[i] = sum_lanes(x[i]);
}

inline Vec butterflies_of_lanes(Vec x) {
  for (int d = 1; d < kLanes; d *= 2)
    for (int i = 0; i < kLanes; ++i)
      if ((i & d) == 0) {
        const float sum = x.v[i] + x.v[i + d];
        x.v[i + d] = x.v[i] - x.v[i + d];
        x.v[i] = sum;
      }
  return x;
}

inline uint32_t positive_bits_of_8(const float* x) {
  uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(x[i] > 0) << i;
  return bits;
}

struct Tile16 {
  uint16_t v[32];
};
inline Tile16 zero_tile() { return {}; }
inline Tile16 load_tile(const uint16_t* p) {
  Tile16 tile;
  memcpy(tile.v, p, sizeof tile.v);
  return tile;
}
inline void store_bytes(uint8_t* p, const Tile16& counts) {
  for (int i = 0; i < 32; ++i) p[i] = static_cast<uint8_t>(counts.v[i]);
}
inline Tile16 count_equal(Tile16 counts, Tile16 codes, uint16_t code) {
  for (int i = 0; i < 32; ++i)
    counts.v[i] = static_cast<uint16_t>(counts.v[i] + (codes.v[i] == code));
  return counts;
}
inline uint32_t at_least(const Tile16& counts, int threshold) {
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(counts.v[i] >= threshold) << i;
  return bits;
}
inline uint32_t take_at_least(uint8_t* counters, int threshold) {
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(counters[i] >= threshold) << i;
  memset(counters, 0, 32);
  return bits;
}

#endif

inline Vec load(const float* p, AllLanes) { return load(p); }
inline void store(float* p, Vec x, AllLanes) { store(p, x); }
template <class Element>
inline Vec load_row(Element type, const uint8_t* p, AllLanes) {
  return load_row(type, p);
}
