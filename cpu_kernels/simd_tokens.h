// The vectors of signature_encode.inl beyond simd.h, where every lane is of another token.
//
// Included inside the namespace of an ISA after simd.h, like that and with the same branches.

/// Rows are loaded so many elements at a time: head sizes are multiples.
constexpr int kColumnsAtOnce = 8;

struct Pair {
  Vec first, second;
};

#if defined(MAGICPIG_SIMD_AVX2)

/// 16 bytes of a row for each quarter of a vector: lanes 4 i to 4 i + 3 get those of row 4 i.
inline IntVec load_quarters(const uint8_t* row, size_t stride) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 4 * stride));
  return {_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1)};
}
inline IntVec load_words(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline IntVec unpack_low_32(IntVec a, IntVec b) { return {_mm256_unpacklo_epi32(a.v, b.v)}; }
inline IntVec unpack_high_32(IntVec a, IntVec b) { return {_mm256_unpackhi_epi32(a.v, b.v)}; }
inline IntVec unpack_low_64(IntVec a, IntVec b) { return {_mm256_unpacklo_epi64(a.v, b.v)}; }
inline IntVec unpack_high_64(IntVec a, IntVec b) { return {_mm256_unpackhi_epi64(a.v, b.v)}; }
inline Vec as_floats(IntVec x) { return {_mm256_castsi256_ps(x.v)}; }
/// The bfloat16 of the low and of the high half of each lane.
inline Vec low_bfloat16(IntVec x) { return as_floats({_mm256_slli_epi32(x.v, 16)}); }
inline Vec high_bfloat16(IntVec x) {
  return as_floats({_mm256_and_si256(x.v, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))});
}
inline void widen_columns(Float16, const uint8_t* p, float* to) {
  store(to, load_row(Float16{}, p));
}

/// Not a < b: true where either is NaN.
inline Mask not_less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)}; }
/// sum + x in the lanes of the mask.
inline Vec add_where(Mask mask, Vec sum, Vec x) {
  return {_mm256_add_ps(sum.v, _mm256_and_ps(mask.v, x.v))};
}
inline IntVec zero_words() { return {_mm256_setzero_si256()}; }
/// count + 1 in the lanes of the mask.
inline IntVec count_where(Mask mask, IntVec count) {
  return {_mm256_sub_epi32(count.v, _mm256_castps_si256(mask.v))};
}
/// A bit from below for each half of a word: 2 half, or 2 half + 1 in the lanes of its mask.
inline IntVec shift_in(IntVec word, Mask low, Mask high) {
  const __m256i bits =
      _mm256_blend_epi16(_mm256_castps_si256(low.v), _mm256_castps_si256(high.v), 0xaa);
  return {_mm256_sub_epi16(_mm256_add_epi16(word.v, word.v), bits)};
}
/// The low half of each word as its high half, and as both.
inline IntVec low_as_high(IntVec word) { return {_mm256_slli_epi32(word.v, 16)}; }
inline IntVec low_as_both(IntVec word) {
  const __m256i high = _mm256_slli_epi32(word.v, 16);
  return {_mm256_or_si256(high, _mm256_srli_epi32(high, 16))};
}
inline IntVec exclusive_or(IntVec a, IntVec b) { return {_mm256_xor_si256(a.v, b.v)}; }
/// The float two before x >= 0, at least 0.
inline Vec two_floats_down(Vec x) {
  const __m256i down = _mm256_sub_epi32(_mm256_castps_si256(x.v), _mm256_set1_epi32(2));
  return as_floats({_mm256_max_epi32(down, _mm256_setzero_si256())});
}
/// The float after x >= 0 in the lanes of the mask.
inline Vec next_float_where(Mask mask, Vec x) {
  return as_floats(count_where(mask, {_mm256_castps_si256(x.v)}));
}
/// The two bytes of each lane's low half to low[lane] and low[stride + lane], those of its high
/// half to `high`.
inline void store_halves(IntVec words, uint8_t* low, uint8_t* high, size_t stride) {
  const __m256i by_byte = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i halves = _mm256_shuffle_epi8(words.v, by_byte);
  const __m256i rows =
      _mm256_permutevar8x32_epi32(halves, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m128i low_rows = _mm256_castsi256_si128(rows);
  const __m128i high_rows = _mm256_extracti128_si256(rows, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(low), low_rows);
  _mm_storeh_pd(reinterpret_cast<double*>(low + stride), _mm_castsi128_pd(low_rows));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(high), high_rows);
  _mm_storeh_pd(reinterpret_cast<double*>(high + stride), _mm_castsi128_pd(high_rows));
}

#elif defined(MAGICPIG_SIMD_AVX512)

inline IntVec load_quarters(const uint8_t* row, size_t stride) {
  const auto load = [&](size_t quarter) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 4 * quarter * stride));
  };
  __m512i x = _mm512_castsi128_si512(load(0));
  x = _mm512_inserti32x4(x, load(1), 1);
  x = _mm512_inserti32x4(x, load(2), 2);
  return {_mm512_inserti32x4(x, load(3), 3)};
}
inline IntVec load_words(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline IntVec unpack_low_32(IntVec a, IntVec b) { return {_mm512_unpacklo_epi32(a.v, b.v)}; }
inline IntVec unpack_high_32(IntVec a, IntVec b) { return {_mm512_unpackhi_epi32(a.v, b.v)}; }
inline IntVec unpack_low_64(IntVec a, IntVec b) { return {_mm512_unpacklo_epi64(a.v, b.v)}; }
inline IntVec unpack_high_64(IntVec a, IntVec b) { return {_mm512_unpackhi_epi64(a.v, b.v)}; }
inline Vec as_floats(IntVec x) { return {_mm512_castsi512_ps(x.v)}; }
inline Vec low_bfloat16(IntVec x) { return as_floats({_mm512_slli_epi32(x.v, 16)}); }
inline Vec high_bfloat16(IntVec x) {
  return as_floats({_mm512_and_si512(x.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))});
}
inline void widen_columns(Float16, const uint8_t* p, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline Mask not_less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ)}; }
inline Vec add_where(Mask mask, Vec sum, Vec x) {
  return {_mm512_mask_add_ps(sum.v, mask.v, sum.v, x.v)};
}
inline IntVec zero_words() { return {_mm512_setzero_si512()}; }
inline IntVec count_where(Mask mask, IntVec count) {
  return {_mm512_mask_add_epi32(count.v, mask.v, count.v, _mm512_set1_epi32(1))};
}
inline IntVec shift_in(IntVec word, Mask low, Mask high) {
  const __m512i twice = _mm512_add_epi16(word.v, word.v);
  const __m512i with_low = _mm512_mask_add_epi32(twice, low.v, twice, _mm512_set1_epi32(1));
  return {_mm512_mask_add_epi32(with_low, high.v, with_low, _mm512_set1_epi32(1 << 16))};
}
inline IntVec low_as_high(IntVec word) { return {_mm512_slli_epi32(word.v, 16)}; }
inline IntVec low_as_both(IntVec word) {
  const __m512i high = _mm512_slli_epi32(word.v, 16);
  return {_mm512_or_si512(high, _mm512_srli_epi32(high, 16))};
}
inline IntVec exclusive_or(IntVec a, IntVec b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Vec two_floats_down(Vec x) {
  const __m512i down = _mm512_sub_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(2));
  return as_floats({_mm512_max_epi32(down, _mm512_setzero_si512())});
}
inline Vec next_float_where(Mask mask, Vec x) {
  return as_floats(count_where(mask, {_mm512_castps_si512(x.v)}));
}
inline void store_halves(IntVec words, uint8_t* low, uint8_t* high, size_t stride) {
  const __m512i by_byte =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i by_quarter =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i rows = _mm512_permutexvar_epi32(by_quarter, _mm512_shuffle_epi8(words.v, by_byte));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_extracti32x4_epi32(rows, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low + stride), _mm512_extracti32x4_epi32(rows, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_extracti32x4_epi32(rows, 2));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high + stride), _mm512_extracti32x4_epi32(rows, 3));
}

#else  // portable

inline Mask not_less(Vec a, Vec b) {
  Mask mask;
  for (int i = 0; i < kLanes; ++i) mask.v[i] = !(a.v[i] < b.v[i]);
  return mask;
}
inline Vec add_where(Mask mask, Vec sum, Vec x) {
  for (int i = 0; i < kLanes; ++i) sum.v[i] += mask.v[i] ? x.v[i] : 0.0f;
  return sum;
}
inline IntVec zero_words() { return {}; }
inline IntVec count_where(Mask mask, IntVec count) {
  for (int i = 0; i < kLanes; ++i) count.v[i] += mask.v[i];
  return count;
}
inline IntVec shift_in(IntVec word, Mask low, Mask high) {
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t twice = static_cast<uint32_t>(word.v[i]) << 1 & 0xfffeffffu;
    word.v[i] = static_cast<int32_t>(twice + low.v[i] + (static_cast<uint32_t>(high.v[i]) << 16));
  }
  return word;
}
inline IntVec low_as_high(IntVec word) {
  for (int32_t& x : word.v) x = static_cast<int32_t>(static_cast<uint32_t>(x) << 16);
  return word;
}
inline IntVec low_as_both(IntVec word) {
  for (int32_t& x : word.v)
    x = static_cast<int32_t>((static_cast<uint32_t>(x) & 0xffffu) * 0x10001u);
  return word;
}
inline IntVec exclusive_or(IntVec a, IntVec b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] ^= b.v[i];
  return a;
}
inline Vec two_floats_down(Vec x) {
  for (float& value : x.v) {
    const uint32_t bits = bits_of_float(value);
    value = float_of_bits(bits > 2 ? bits - 2 : 0);
  }
  return x;
}
inline Vec next_float_where(Mask mask, Vec x) {
  for (int i = 0; i < kLanes; ++i) x.v[i] = float_of_bits(bits_of_float(x.v[i]) + mask.v[i]);
  return x;
}
inline void store_halves(IntVec words, uint8_t* low, uint8_t* high, size_t stride) {
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t word = static_cast<uint32_t>(words.v[i]);
    low[i] = static_cast<uint8_t>(word);
    low[stride + i] = static_cast<uint8_t>(word >> 8);
    high[i] = static_cast<uint8_t>(word >> 16);
    high[stride + i] = static_cast<uint8_t>(word >> 24);
  }
}
/// 2 kLanes elements of a row; store_pair puts them in their order.
template <class Element>
inline Pair load_pair(Element type, const uint8_t* p) {
  return {load_row(type, p), load_row(type, p + kLanes * Element::kBytes)};
}
template <class Element>
inline void store_pair(Element, float* to, Pair x) {
  store(to, x.first);
  store(to + kLanes, x.second);
}
/// to[i], lane t: element i of row t, `stride` bytes from one row to the next.
template <class Element>
inline void load_columns(Element type, const uint8_t* rows, size_t stride,
                         Vec (&to)[kColumnsAtOnce]) {
  for (size_t t = 0; t < kLanes; ++t) {
    const Vec row = load_row(type, rows + t * stride);
    for (int i = 0; i < kColumnsAtOnce; ++i) to[i].v[t] = row.v[i];
  }
}

#endif

#if defined(MAGICPIG_SIMD_AVX2) || defined(MAGICPIG_SIMD_AVX512)

/// 2 kLanes elements of a row; store_pair puts them in their order. A word holds two bfloat16.
template <class Element>
inline Pair load_pair(Element type, const uint8_t* p) {
  return {load_row(type, p), load_row(type, p + kLanes * Element::kBytes)};
}
inline Pair load_pair(BFloat16, const uint8_t* p) {
  const IntVec words = load_words(p);
  return {low_bfloat16(words), high_bfloat16(words)};
}
template <class Element>
inline void store_pair(Element, float* to, Pair x) {
  store(to, x.first);
  store(to + kLanes, x.second);
}
inline void store_pair(BFloat16, float* to, Pair x) {
  alignas(64) float first[kLanes], second[kLanes];
  store(first, x.first);
  store(second, x.second);
  for (int i = 0; i < kLanes; ++i) {
    to[2 * i] = first[i];
    to[2 * i + 1] = second[i];
  }
}

/// Loads 16 bytes of each row, as 4 vectors of the rows' words.
inline void transpose_words(const uint8_t* rows, size_t stride, IntVec (&to)[4]) {
  IntVec row[4];
  for (size_t i = 0; i < 4; ++i) row[i] = load_quarters(rows + i * stride, stride);
  const IntVec a = unpack_low_32(row[0], row[1]), b = unpack_high_32(row[0], row[1]);
  const IntVec c = unpack_low_32(row[2], row[3]), d = unpack_high_32(row[2], row[3]);
  to[0] = unpack_low_64(a, c);
  to[1] = unpack_high_64(a, c);
  to[2] = unpack_low_64(b, d);
  to[3] = unpack_high_64(b, d);
}
/// to[i], lane t: element i of row t, `stride` bytes from one row to the next.
inline void load_columns(Float32, const uint8_t* rows, size_t stride, Vec (&to)[kColumnsAtOnce]) {
  IntVec words[4];
  for (int half = 0; half < 2; ++half) {
    transpose_words(rows + 16 * half, stride, words);
    for (int i = 0; i < 4; ++i) to[4 * half + i] = as_floats(words[i]);
  }
}
inline void load_columns(BFloat16, const uint8_t* rows, size_t stride, Vec (&to)[kColumnsAtOnce]) {
  IntVec words[4];
  transpose_words(rows, stride, words);
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = low_bfloat16(words[i]);
    to[2 * i + 1] = high_bfloat16(words[i]);
  }
}
inline void load_columns(Float16 type, const uint8_t* rows, size_t stride,
                         Vec (&to)[kColumnsAtOnce]) {
  alignas(64) float widened[kLanes][kColumnsAtOnce];
  for (size_t t = 0; t < kLanes; ++t) widen_columns(type, rows + t * stride, widened[t]);
  load_columns(Float32{}, reinterpret_cast<const uint8_t*>(widened), sizeof widened[0], to);
}

#endif
