// splitmix64 (Steele, Lea and Flood, OOPSLA 2014): a word of 64 random bits for each counter.
#pragma once

#include <cstdint>

namespace magicpig {

inline uint64_t split_mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace magicpig
