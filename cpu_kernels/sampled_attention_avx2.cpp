// The kernels for AVX2, FMA and F16C.
#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#include "elements.h"
#include "kernels.h"

// After the includes, so that no inline function of theirs is compiled for this ISA: the linker
// keeps one copy of each, and on another CPU it would be the wrong one. Never popped: templates are
// instantiated at the end of the file.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define MAGICPIG_SIMD_AVX2

namespace magicpig::avx2 {
namespace {
#include "sampled_attention.inl"
#include "signature_encode.inl"
#include "signature_scan.inl"
}  // namespace

#include "kernel_table.inl"

}  // namespace magicpig::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // x86-64
