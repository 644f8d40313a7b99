#include "decode_record.h"

#include <algorithm>
#include <cmath>

namespace magicpig {

void DecodeRecord::add(const int64_t* slots, int num_q_heads, const DecodeOutput& output,
                       uint64_t store_ns, uint64_t step_ns) {
  std::lock_guard<std::mutex> lock(mutex_);
  bool real = false;
  for (size_t i = 0; i < output.middles.size(); ++i) {
    if (slots != nullptr && slots[i] < 0) continue;
    real = true;
    const int32_t* rows = output.sampled_rows + i * static_cast<size_t>(num_q_heads);
    for (int head = 0; head < num_q_heads; ++head) {
      if (rows[head] < 0) {
        ++counters_.exact_heads;
        continue;
      }
      const size_t position = counters_.sampled_heads++ % kRecentHeads;
      if (position == recent_rows_.size()) recent_rows_.push_back(0);
      recent_rows_[position] = rows[head];
      counters_.sampled_rows += static_cast<uint64_t>(rows[head]);
      counters_.middle_rows += static_cast<uint64_t>(output.middles[i]);
    }
    if (output.error_bars.empty()) continue;
    const float* bars = output.error_bars.data() + i * static_cast<size_t>(num_q_heads);
    for (int head = 0; head < num_q_heads; ++head) {
      if (std::isnan(bars[head])) continue;
      ++counters_.error_bars;
      counters_.error_bar_sum += static_cast<double>(std::min(bars[head], kMostErrorBar));
    }
  }
  if (!real) return;
  ++counters_.decode_steps;
  counters_.hash_ns += output.hash_ns;
  counters_.lookup_ns += output.lookup_ns;
  counters_.attend_ns += output.attention_ns;
  counters_.store_ns += store_ns;
  counters_.step_ns += step_ns;
}

void DecodeRecord::forget() {
  std::lock_guard<std::mutex> lock(mutex_);
  counters_ = {};
  recent_rows_.clear();
}

DecodeCounters DecodeRecord::counters() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return counters_;
}

std::vector<int32_t> DecodeRecord::recent_rows() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return recent_rows_;
}

}  // namespace magicpig
