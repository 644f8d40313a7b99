// Elements of rows, queries and outputs as floats and back, a few thousand a step: plain loops.
#pragma once

#include <cstdint>
#include <cstring>

#include "magicpig.h"

namespace magicpig {

inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float float_of_bfloat16(uint16_t x) { return float_of_bits(static_cast<uint32_t>(x) << 16); }
inline float float_of_float16(uint16_t x) {
  // 2^112 moves the exponent's bias from 15 to 127, and makes subnormals normal.
  const float magnitude = float_of_bits((x & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = (x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return float_of_bits(bits_of_float(magnitude) | special | (x & 0x8000u) << 16);
}

/// Rounded to nearest, ties to even; a NaN stays one.
inline uint16_t bfloat16_of(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}
inline uint16_t float16_of(float x) {
  const uint32_t sign = bits_of_float(x) >> 16 & 0x8000;
  const uint32_t magnitude = bits_of_float(x) & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more
  // Below 2^-14 halves are multiples of 2^-24, as the floats from 0.5 to 1 are: the sum rounds.
  if (magnitude < 0x38800000)
    return static_cast<uint16_t>(sign |
                                 (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u));
  const uint32_t rebiased = magnitude - (112u << 23);
  return static_cast<uint16_t>(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13);
}

inline void to_float(RowType type, const uint8_t* from, size_t size, float* to) {
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
  switch (type) {
    case RowType::float32:
      std::memcpy(to, from, size * sizeof(float));
      return;
    case RowType::bfloat16:
      for (size_t i = 0; i < size; ++i) to[i] = float_of_bfloat16(halves[i]);
      return;
    case RowType::float16:
      for (size_t i = 0; i < size; ++i) to[i] = float_of_float16(halves[i]);
      return;
  }
}

inline void from_float(RowType type, const float* from, size_t size, uint8_t* to) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(to);
  switch (type) {
    case RowType::float32:
      std::memcpy(to, from, size * sizeof(float));
      return;
    case RowType::bfloat16:
      for (size_t i = 0; i < size; ++i) halves[i] = bfloat16_of(from[i]);
      return;
    case RowType::float16:
      for (size_t i = 0; i < size; ++i) halves[i] = float16_of(from[i]);
      return;
  }
}

}  // namespace magicpig
