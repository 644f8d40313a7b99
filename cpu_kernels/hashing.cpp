// SimHash by Walsh-Hadamard transforms, and codes packed from projections.
#include <algorithm>
#include <utility>

#include "kernels.h"

namespace magicpig {

SimHash::SimHash(int head_size, int num_bits, int num_tables, int size, std::vector<float> signs)
    : head_size_(head_size),
      num_bits_(num_bits),
      num_tables_(num_tables),
      size_(size),
      signs_(std::move(signs)) {}

int SimHash::num_blocks(int num_bits, int num_tables, int size) {
  if (num_bits == 1) return num_tables / InclusionTable::kBitsPerWord;
  return (num_tables + size - 1) / size * num_bits;
}

void SimHash::hash(const float* vectors, size_t num_vectors, const float* centers, size_t num_heads,
                   uint16_t* codes, Isa isa, ThreadPool& pool) const {
  const HashPlan plan = {head_size_,  size_,          code_words(),
                         word_bits(), num_bits_ == 1, signs_.data()};
  // A decode step's few dozen vectors are still to fill the cores.
  const size_t task_vectors = num_vectors > 1024 ? 8 * kMaxLanes : kMaxLanes;
  pool.run((num_vectors + task_vectors - 1) / task_vectors, [&](size_t task, int) {
    const size_t first = task * task_vectors;
    const size_t count = first + task_vectors < num_vectors ? task_vectors : num_vectors - first;
    // The heads of the task's vectors go on where those before it end.
    kernels_of(isa).hash(plan, vectors + first * static_cast<size_t>(head_size_), count, centers,
                         num_heads, first % num_heads,
                         codes + first * static_cast<size_t>(code_words()));
  });
}

void pack_codes(const float* projections, size_t num_rows, int num_tables, int num_bits,
                uint16_t* codes, Isa isa, ThreadPool& pool) {
  constexpr size_t kRowsPerTask = 64;
  pool.run((num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](size_t task, int) {
    const size_t begin = task * kRowsPerTask;
    const size_t rows = std::min(kRowsPerTask, num_rows - begin);
    const size_t tables = static_cast<size_t>(num_tables);
    kernels_of(isa).pack_codes(projections + begin * tables * static_cast<size_t>(num_bits), rows,
                               num_tables, num_bits, codes + begin * tables);
  });
}

}  // namespace magicpig
