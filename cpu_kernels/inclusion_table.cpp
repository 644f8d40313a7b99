// log u = log P[Binomial(L, p^K) >= t], ready for the kernels.
//
// log u falls like t K log p towards p = 0, where no table can follow it, so the table holds what
// is left, g(p) = log u(p) - t K log p, which is smooth from g(0) = log C(L, t) to g(1) = 0. The
// kernel computes log u = g(p) + t K log p. Its error has three parts:
// - linear interpolation: h^2 / 8 max|g''| with h = 1/8192. g'' is largest where u leaves the power
//   law, about t K / (p * width) with a width of 2 / K: below 300 for (K, L, t) = (10, 150, 2) and
//   800 for (15, 255, 2), hence below 6e-7 and 1.5e-6;
// - fp32 rounding of g and of t K log p, each below 2^-24 of its size. The sizes are at most log
//   C(L, t) and cancel where u is about 1: below 1e-6 at (10, 150, 2), 4e-6 at (1, 128, 64), where
//   log C(128, 64) = 87;
// - the error dp of p itself, times d log u / dp <= t K / p. For cosines above 0, dp is below 6e-8
//   (p near 1 has no finer floats); below 0, p = acos(-cosine) / pi keeps its relative precision.
//   With t K = 20 that is 2.4e-6 at p = 0.5.
// Together below 1e-5 max(1, |log u|) as long as t K is below about 80. Beyond, the last part
// dominates: up to 6e-8 t K (1.5e-4 at K = 10, t = L = 255).
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

/// log of the sum over k in [begin, end) of the binomial pmf, divided by x^t. log x^t is added only
/// as (k - t) log x, so that x = 0 needs no special case beyond 0 * -inf.
double log_pmf_sum(int num_tables, int begin, int end, int t, double log_x, double log_rest) {
  std::vector<double> terms;
  double largest = -std::numeric_limits<double>::infinity();
  for (int k = begin; k < end; ++k) {
    const double log_choose =
        log_factorial(num_tables) - log_factorial(k) - log_factorial(num_tables - k);
    const double successes = k == t ? 0.0 : (k - t) * log_x;
    const double failures = k == num_tables ? 0.0 : (num_tables - k) * log_rest;
    terms.push_back(log_choose + successes + failures);
    largest = terms.back() > largest ? terms.back() : largest;
  }
  if (!std::isfinite(largest)) return largest;
  double sum = 0.0;
  for (double term : terms) sum += std::exp(term - largest);
  return largest + std::log(sum);
}

double g_of(double p, int num_bits, int num_tables, int t) {
  if (p >= 1.0) return 0.0;
  const double log_x = num_bits * std::log(p);
  const double log_rest = std::log1p(-std::exp(log_x));
  // The upper tail loses its relative precision as log u nears 0; there u is 1 - lower tail.
  if (p > 0.0) {
    const double log_lower = log_pmf_sum(num_tables, 0, t, 0, log_x, log_rest);
    if (log_lower < std::log(0.5)) return std::log1p(-std::exp(log_lower)) - t * log_x;
  }
  return log_pmf_sum(num_tables, t, num_tables + 1, t, log_x, log_rest);
}

}  // namespace

InclusionTable::InclusionTable(int num_bits_, int num_tables_, int min_matches_)
    : num_bits(num_bits_),
      num_tables(num_tables_),
      min_matches(min_matches_),
      power(static_cast<float>(min_matches_ * num_bits_)),
      g(kIntervals + 1) {
  for (int i = 0; i <= kIntervals; ++i)
    g[static_cast<size_t>(i)] = static_cast<float>(
        g_of(static_cast<double>(i) / kIntervals, num_bits, num_tables, min_matches));
}

void log_u(const InclusionTable& table, const float* cosine, size_t size, float* out, Isa isa) {
  kernels_of(isa).log_u(table, cosine, size, out);
}

}  // namespace magicpig
