// The intrinsics of the AVX-512 kernels. With MAGICPIG_SIMDE they are SIMDe's, the same names in
// terms of AVX2, so that a test runs the very source where AVX-512 is missing.
#pragma once

#if defined(MAGICPIG_SIMDE)

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#include <string.h>

// SIMDe 0.8.2 touches what a mask leaves out: its loads read it, its stores overwrite it with zero.
// The masks here are those of the first lanes, so that a copy of that many stands in.
namespace magicpig {

inline __m512 simde_load_first(__mmask16 lanes, const void* from) {
  float values[16] = {};
  memcpy(values, from, __builtin_popcount(lanes) * sizeof(float));
  return _mm512_loadu_ps(values);
}
inline __m256i simde_load_first_halves(__mmask16 lanes, const void* from) {
  uint16_t values[16] = {};
  memcpy(values, from, __builtin_popcount(lanes) * sizeof(uint16_t));
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
}
inline void simde_store_first(void* to, __mmask16 lanes, __m512 x) {
  float values[16];
  _mm512_storeu_ps(values, x);
  memcpy(to, values, __builtin_popcount(lanes) * sizeof(float));
}

}  // namespace magicpig

#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps magicpig::simde_load_first
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 magicpig::simde_load_first_halves
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps magicpig::simde_store_first

#else

#if defined(__GNUC__) && !defined(__clang__)
// GCC bug 105593, seen with 12.2: it warns of _mm512_undefined_ps() inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#endif
