// Which instruction set runs. A new one adds its line to each function.
#include "kernels.h"

namespace magicpig {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_vpopcnt:
      return "avx512_vpopcnt";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::portable:
      return "portable";
  }
  return "unknown";
}

#if defined(__x86_64__)

namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

#if defined(MAGICPIG_SIMDE)  // the AVX-512 kernels in terms of AVX2, for a test
bool has_avx512() { return has_avx2(); }
bool has_avx512_vpopcnt() { return has_avx2(); }
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512cd");
}
bool has_avx512_vpopcnt() {
  return has_avx512() && __builtin_cpu_supports("avx512vpopcntdq") &&
         __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vbmi2");
}
#endif

}  // namespace

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::avx512_vpopcnt:
      return has_avx512_vpopcnt();
    case Isa::avx512:
      return has_avx512();
    case Isa::avx2:
      return has_avx2();
    case Isa::portable:
      return true;
  }
  return false;  // a number that names none
}

const Kernels& kernels_of(Isa isa) {
  switch (isa) {
    case Isa::avx512_vpopcnt:
      return avx512_vpopcnt::kernels;
    case Isa::avx512:
      return avx512::kernels;
    case Isa::avx2:
      return avx2::kernels;
    case Isa::portable:
      break;
  }
  return portable::kernels;
}

#else

bool isa_available(Isa isa) { return isa == Isa::portable; }

const Kernels& kernels_of(Isa) { return portable::kernels; }

#endif

Isa best_isa() {
  for (Isa isa : {Isa::avx512_vpopcnt, Isa::avx512, Isa::avx2})
    if (isa_available(isa)) return isa;
  return Isa::portable;
}

}  // namespace magicpig
