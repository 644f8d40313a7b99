// What is refused, and in which words. Python-free: host callbacks check their metadata, too.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "magicpig.h"

namespace magicpig {

template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

/// Throws std::invalid_argument: ValueError in Python.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw std::invalid_argument(sentence(parts...));
}

inline int in_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    refuse(name, " is ", value, ", but must lie in ", low, "..", high, "; pass one that does.");
  return static_cast<int>(value);
}

/// A number of tokens; beyond INT_MAX none is told apart.
inline int token_count(const char* name, int64_t value) {
  if (value < 0) refuse(name, " is ", value, ", but is a number of tokens; pass 0 or more.");
  return static_cast<int>(std::min<int64_t>(value, INT_MAX));
}

/// lowest: -1 where slots may say "not stored", else 0.
inline void check_slot(const Pages& pages, int64_t i, int64_t slot, int64_t lowest) {
  const int64_t end = static_cast<int64_t>(pages.num_blocks()) * pages.layout().block_size;
  if (slot < lowest || slot >= end)
    refuse("slots[", i, "] is ", slot, ", but slots lie in ", lowest, "..", end - 1,
           "; pass slots of this layer's ", pages.num_blocks(), " blocks.");
}

/// Tokens that blocks have room for, of which a request may hold 2^30 at most: sums of two such
/// numbers are ints everywhere.
inline int64_t token_capacity(int64_t num_blocks, int64_t block_size) {
  return std::min(num_blocks * block_size, int64_t{1} << 30);
}

/// Blocks that a request's length needs of its max_blocks.
inline int check_seq_len(const Pages& pages, int64_t row, int64_t max_blocks, int32_t seq_len) {
  const int64_t block_size = pages.layout().block_size;
  const int64_t capacity = token_capacity(max_blocks, block_size);
  if (seq_len < 0 || seq_len > capacity)
    refuse("seq_lens[", row, "] is ", seq_len, ", but lies in 0..", capacity, " with ", max_blocks,
           " blocks of ", block_size, "; pass wider block_tables.");
  return static_cast<int>((seq_len + block_size - 1) / block_size);
}

inline void check_blocks(const Pages& pages, int64_t row, const int32_t* blocks, int num_blocks,
                         int32_t seq_len) {
  for (int i = 0; i < num_blocks; ++i)
    if (blocks[i] < 0 || blocks[i] >= pages.num_blocks())
      refuse("block_tables[", row, ", ", i, "] is ", blocks[i], ", but blocks lie in 0..",
             pages.num_blocks() - 1, "; pass the blocks that hold the request's ", seq_len,
             " tokens.");
}

/// size codes; none of more bits than the rule's codes have.
inline void check_query_codes(const uint16_t* codes, size_t size, int num_bits) {
  const uint16_t* largest = std::max_element(codes, codes + size);
  if (size > 0 && *largest >> num_bits != 0)
    refuse("query_codes holds ", *largest, ", but codes of ", num_bits, " bits lie in 0..",
           (1 << num_bits) - 1, "; hash with the rule's K.");
}

}  // namespace magicpig
