// The intrinsics of the AVX-512 kernels. With MAGICPIG_SIMDE they are SIMDe's, the same names in
// terms of AVX2, so that a test runs the very source where AVX-512 is missing.
#pragma once

#if defined(MAGICPIG_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#else
#if defined(__GNUC__) && !defined(__clang__)
// GCC bug 105593, seen with 12.2: it warns of _mm512_undefined_ps() inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif
