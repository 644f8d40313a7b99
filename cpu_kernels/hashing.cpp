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
  return (num_tables + size - 1) / size * num_bits;
}

namespace {

/// A decode step's few dozen vectors are still to fill the cores.
size_t task_vectors(size_t num_vectors) {
  return num_vectors > 1024 ? 8 * static_cast<size_t>(kMaxLanes) : kMaxLanes;
}

}  // namespace

size_t SimHash::num_tasks(size_t num_vectors) {
  const size_t size = task_vectors(num_vectors);
  return (num_vectors + size - 1) / size;
}

void SimHash::hash_task(size_t task, const float* vectors, size_t num_vectors, const float* centers,
                        size_t num_heads, uint16_t* codes, Isa isa) const {
  const HashPlan plan = {head_size_, size_, num_bits_, num_tables_, signs_.data()};
  const size_t size = task_vectors(num_vectors), first = task * size;
  // The heads of the task's vectors go on where those before it end.
  kernels_of(isa).hash(plan, vectors + first * static_cast<size_t>(head_size_),
                       std::min(size, num_vectors - first), centers, num_heads, first % num_heads,
                       codes + first * static_cast<size_t>(num_tables_));
}

void SimHash::hash(const float* vectors, size_t num_vectors, const float* centers, size_t num_heads,
                   uint16_t* codes, Isa isa, ThreadPool& pool) const {
  pool.run(num_tasks(num_vectors), [&](size_t task, int) {
    hash_task(task, vectors, num_vectors, centers, num_heads, codes, isa);
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
