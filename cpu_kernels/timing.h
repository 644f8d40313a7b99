// Wall time of a step's stages.
#pragma once

#include <chrono>
#include <cstdint>

namespace magicpig {

using Clock = std::chrono::steady_clock;

inline uint64_t nanoseconds(Clock::duration time) {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(time).count());
}
inline uint64_t nanoseconds_since(Clock::time_point start) {
  return nanoseconds(Clock::now() - start);
}

}  // namespace magicpig
