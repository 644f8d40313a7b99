// log u = log P[Binomial(L, p^K) >= t], ready for the kernels.
//
// log u falls like t K log p towards p = 0, where no table can follow it, so the table holds what
// is left, g(p) = log u(p) - t K log p, which is smooth from g(0) = log C(L, t) to g(1) = 0. The
// kernel computes log u = g(p) + t K log p, and from the tables of t and t + 1 what a share of the
// tokens at the threshold makes of it (Threshold). The error of log u has three parts:
// - linear interpolation: h^2 / 8 max|g''| with h = 1/8192. g'' is largest where u leaves the power
//   law, about t K / (p * width) with a width of 2 / K: below 300 for (K, L, t) = (10, 150, 2) and
//   800 for (15, 255, 2), hence below 6e-7 and 1.5e-6;
// - fp32 rounding of g and of t K log p, each below 2^-24 of its size. The sizes are at most log
//   C(L, t) and cancel where u is about 1: below 1e-6 at (10, 150, 2);
// - the error dp of p itself, times d log u / dp <= t K / p. For cosines above 0, dp is below 6e-8
//   (p near 1 has no finer floats); below 0, p = acos(-cosine) / pi keeps its relative precision.
//   With t K = 20 that is 2.4e-6 at p = 0.5.
// Together below 1e-5 max(1, |log u|) as long as t K is below about 80. Beyond, the last part
// dominates: 6e-8 t K / p (1.5e-4 at p = 1, K = 10, t = L = 255). The mixture's logarithm lies
// between those of t and t + 1, and so does its error.
#include <cmath>
#include <limits>

#include "kernels.h"

namespace magicpig {
namespace {

/// std::lgamma would write its sign to a global, and tables are made in several threads at once.
double log_factorial(int n) {
  int sign;
  return lgamma_r(n + 1.0, &sign);
}

double log_add(double a, double b) {
  const double larger = a > b ? a : b;
  if (!std::isfinite(larger)) return larger;
  return larger + std::log1p(std::exp((a > b ? b : a) - larger));
}

}  // namespace

InclusionTable::InclusionTable(int num_bits, int num_tables)
    : num_bits_(num_bits),
      num_tables_(num_tables),
      g_(static_cast<size_t>(num_tables + 2) * (kIntervals + 1)) {
  const size_t num_t = static_cast<size_t>(num_tables) + 2;
  std::vector<double> log_choose(num_t), upper(num_t), lower(num_t);
  for (int k = 0; k <= num_tables; ++k)
    log_choose[k] = log_factorial(num_tables) - log_factorial(k) - log_factorial(num_tables - k);
  const double nothing = -std::numeric_limits<double>::infinity();
  for (int i = 0; i <= kIntervals; ++i) {
    const double p = static_cast<double>(i) / kIntervals;
    const double log_x = num_bits * std::log(p);
    const double log_rest = i == kIntervals ? nothing : std::log1p(-std::exp(log_x));
    const auto failures = [&](int k) {
      return k == num_tables ? 0.0 : (num_tables - k) * log_rest;
    };
    // upper[t] = log(P[c >= t] / x^t), from above; no x^t is divided by, so that x = 0 is no
    // special case. lower[t] = log P[c < t], from below.
    upper[num_t - 1] = nothing;
    for (int t = num_tables; t >= 0; --t)
      upper[t] = log_add(log_choose[t] + failures(t),
                         std::isfinite(upper[t + 1]) ? log_x + upper[t + 1] : nothing);
    lower[0] = nothing;
    for (int t = 1; t <= num_tables; ++t)
      lower[t] = log_add(lower[t - 1],
                         log_choose[t - 1] + (t == 1 ? 0.0 : (t - 1) * log_x) + failures(t - 1));
    for (int t = 0; t <= num_tables; ++t) {
      // The upper tail loses its relative precision as log u nears 0; there u is 1 - lower tail.
      const bool near_one = i > 0 && lower[t] < std::log(0.5);
      const double value = near_one ? std::log1p(-std::exp(lower[t])) - t * log_x : upper[t];
      g_[static_cast<size_t>(t) * (kIntervals + 1) + i] = static_cast<float>(value);
    }
    g_[static_cast<size_t>(num_tables + 1) * (kIntervals + 1) + i] = -1e4f;
  }
}

void log_u(const InclusionTable& table, Threshold threshold, const float* cosine, size_t size,
           float* out, Isa isa) {
  kernels_of(isa).log_u(weighting_of(table, threshold), cosine, size, out);
}

}  // namespace magicpig
