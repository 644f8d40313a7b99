// The kernels for AVX-512 with VPOPCNTDQ, BITALG and VBMI2: Ice Lake, Zen 4 and later.
#if defined(__x86_64__)

#include <string.h>

#include "elements.h"
#include "intrinsics_avx512.h"
#include "kernels.h"

// After the includes and never popped, as in sampled_attention_avx2.cpp. SIMDe's headers go by what
// the whole file is compiled for: its flags are on the command line then.
#if defined(MAGICPIG_SIMDE)
#elif defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512cd,"               \
                          "avx512vpopcntdq,avx512bitalg,avx512vbmi2,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target(                                \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512cd," \
    "avx512vpopcntdq,avx512bitalg,avx512vbmi2,avx2,fma,f16c")
#endif

#define MAGICPIG_SIMD_AVX512

namespace magicpig::avx512_vpopcnt {
namespace {
#include "sampled_attention.inl"
#include "signature_encode.inl"
#include "signature_scan.inl"
}  // namespace

#include "kernel_table.inl"

}  // namespace magicpig::avx512_vpopcnt

#if defined(__clang__) && !defined(MAGICPIG_SIMDE)
#pragma clang attribute pop
#endif

#endif  // x86-64
