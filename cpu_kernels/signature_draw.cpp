// The draw of a step in integers: noise, chances, and the constant that meets a budget.
// Source: vllm_magicpig/signature_draw.py, which has the reasons.
#include <algorithm>
#include <cmath>

#include "signatures.h"
#include "split_mix.h"

namespace magicpig {

TokenRange SignatureRule::middle(int num_tokens) const {
  const int full = num_tokens / kSignatureBlock * kSignatureBlock;
  const int begin = std::min(sink_tokens, num_tokens);
  return {begin, std::max(begin, std::min(num_tokens - window_tokens, full))};
}

uint64_t SignatureRule::step_word(int kv_head, int num_tokens, int part) const {
  uint64_t word = split_mix(seed);
  for (uint64_t value : {layer, first_kv_head + static_cast<uint64_t>(kv_head),
                         static_cast<uint64_t>(num_tokens - 1), static_cast<uint64_t>(part)})
    word = split_mix(word ^ value);
  return word;
}

// ----------------------------------------------------------------------------------------- noise

namespace {

/// Fisher and Yates, from the last place down; word n is split_mix(n).
void shuffle(std::vector<int16_t>& values, uint64_t& word) {
  for (size_t i = values.size() - 1; i > 0; --i)
    std::swap(values[i], values[split_mix(word++) % (i + 1)]);
}

}  // namespace

NoiseTable::NoiseTable() {
  constexpr int kStrata = kSignatureTile, kRuns = kNoiseEntries / kStrata;
  uint64_t word = 0;
  std::vector<std::vector<int16_t>> of_stratum(kStrata);
  int most = 0;
  for (int s = 0; s < kStrata; ++s) {
    for (int i = s * kRuns; i < (s + 1) * kRuns; ++i) {
      const double units = -std::log2((i + 0.5) / kNoiseEntries) * 128;
      of_stratum[s].push_back(static_cast<int16_t>(std::floor(units)));
      most = std::max<int>(most, of_stratum[s].back());
    }
    shuffle(of_stratum[s], word);
  }
  for (int run = 0; run < kRuns; ++run) {
    std::vector<int16_t> order(kStrata);
    for (int s = 0; s < kStrata; ++s) order[s] = static_cast<int16_t>(s);
    shuffle(order, word);
    for (int16_t s : order) entries_.push_back(of_stratum[s][run]);
  }
  above_.assign(static_cast<size_t>(most) + 1, 0);
  for (int16_t entry : entries_)
    for (int k = 0; k < entry; ++k) ++above_[static_cast<size_t>(k)];
  for (uint32_t above : above_)
    costs_.push_back(above == 0 ? 0.0f : static_cast<float>(-std::log(above / 65536.0)));
  for (int i = 0; i < kStrata; ++i) entries_.push_back(entries_[i]);
}

const NoiseTable& NoiseTable::instance() {
  static const NoiseTable table;
  return table;
}

int NoiseTable::floor_of(double phi) const {
  const double asked = std::max(1.0, std::nearbyint(phi * kNoiseEntries));
  const auto above_more_than = [&](double count) {  // the counts fall
    return static_cast<int>(std::partition_point(above_.begin(), above_.end(),
                                                 [&](uint32_t above) { return above > count; }) -
                            above_.begin());
  };
  return -std::min(above_more_than(asked), above_more_than(0.0) - 1);
}

// ----------------------------------------------------------------------------------------- scale

void CountedChances::add(const int16_t* asked, uint64_t places) {
  if (values_.size() < size_ + kSignatureTile) values_.resize(2 * size_ + kSignatureTile);
  for (; places != 0; places &= places - 1) values_[size_++] = asked[__builtin_ctzll(places)];
}

/// Probes by powers of two before the interval is halved.
constexpr int kPowerTries = 8;

int CountedChances::solve(double rows, int m, int floor) const {
  const NoiseTable& noise = NoiseTable::instance();
  const int64_t most = static_cast<int64_t>(rows / m * static_cast<double>(size_) * kNoiseEntries);
  const auto [least_value, most_value] =
      std::minmax_element(values_.begin(), values_.begin() + static_cast<ptrdiff_t>(size_));
  const int lowest = *least_value, range = *most_value - lowest + 1;
  counts_.assign(static_cast<size_t>(range), 0);
  for (size_t i = 0; i < size_; ++i) ++counts_[static_cast<size_t>(values_[i] - lowest)];
  at_least_.assign(static_cast<size_t>(range) + 1, 0);  // how many are lowest + i or more
  for (size_t i = static_cast<size_t>(range); i-- > 0;)
    at_least_[i] = at_least_[i + 1] + counts_[i];
  const auto at_least = [&](int value) {
    return static_cast<int64_t>(
        at_least_[static_cast<size_t>(std::clamp(value - lowest, 0, range))]);
  };
  const auto total = [&](int log_c) {
    // M is above 0 from `all` on, and at the floor below `first`.
    const int all = 1 - log_c, first = floor + 1 - log_c;
    int64_t sum = at_least(all) * kNoiseEntries;
    sum += (static_cast<int64_t>(size_) - at_least(first)) * noise.chances(floor);
    const int end = std::min(all, lowest + range);
    for (int value = std::max(first, lowest); value < end; ++value)
      sum += static_cast<int64_t>(counts_[static_cast<size_t>(value - lowest)]) *
             noise.chances(value + log_c);
    return sum;
  };
  // The sum grows with log C, nearly as a power of two does: a probe there halves the interval or
  // does better.
  int low = -65536, high = 65536, probe = -*most_value;
  for (int tries = 0; high - low > 1; ++tries) {
    const int log_c = std::clamp(probe, low + 1, high - 1);
    const int64_t sum = total(log_c);
    (sum <= most ? low : high) = log_c;
    const bool by_power = tries < kPowerTries && sum > 0 && most > 0;
    const double units =
        by_power ? 128 * std::log2(static_cast<double>(most) / static_cast<double>(sum)) : 0.0;
    probe = by_power ? log_c + static_cast<int>(std::lround(units)) : low + (high - low) / 2;
  }
  return low;
}

}  // namespace magicpig
