// What the decode steps of one layer did, for its statistics.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "magicpig.h"

namespace magicpig {

/// Since the layer was made, or forgot its steps; times in nanoseconds, lookup and attend summed
/// over threads.
struct DecodeCounters {
  uint64_t decode_steps = 0;
  uint64_t sampled_heads = 0;
  uint64_t exact_heads = 0;
  uint64_t sampled_rows = 0;
  uint64_t middle_rows = 0;
  uint64_t error_bars = 0;   // of query heads in the steps that had any
  double error_bar_sum = 0;  // of these, each at most kMostErrorBar
  uint64_t hash_ns = 0;
  uint64_t lookup_ns = 0;
  uint64_t attend_ns = 0;
  uint64_t store_ns = 0;
  uint64_t step_ns = 0;
};

class DecodeRecord {
 public:
  /// Query heads whose sample sizes are remembered: the last 512 steps of 32.
  static constexpr size_t kRecentHeads = 16384;

  /// What an error bar counts as at most: beyond it an output is noise, however little it holds.
  static constexpr float kMostErrorBar = 1.0f;

  /// One step. slots: of each request's token, negative where the request
  /// is a dummy, or null where none is. Dummies do not count, nor does a step of nothing else.
  void add(const int64_t* slots, int num_q_heads, const DecodeOutput& output, uint64_t store_ns,
           uint64_t step_ns);

  void forget();

  DecodeCounters counters() const;
  /// Rows sampled by the last query heads, in no particular order.
  std::vector<int32_t> recent_rows() const;

 private:
  mutable std::mutex mutex_;  // guards what follows
  DecodeCounters counters_;
  std::vector<int32_t> recent_rows_;
};

}  // namespace magicpig
