// Which instruction set runs. A new one adds its line to each function.
#include "kernels.h"

namespace magicpig {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::portable:
      return "portable";
  }
  return "unknown";
}

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return false;  // not built
    case Isa::avx2:
#if defined(__x86_64__)
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case Isa::portable:
      return true;
  }
  return false;  // a number that names none
}

Isa best_isa() { return isa_available(Isa::avx2) ? Isa::avx2 : Isa::portable; }

const Kernels& kernels_of([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx2) return avx2::kernels;
#endif
  return portable::kernels;
}

}  // namespace magicpig
