// What the benchmarks compare with: the memory system's own speed, and a lookup in the layout of
// MagicPIG's published code. Built on demand by bench_build.py, never shipped.
#include <pthread.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace {

using Clock = std::chrono::steady_clock;
template <class T>
using Array = py::array_t<T, py::array::c_style>;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// ------------------------------------------------------------------------------------------
// threads

/// All threads pass together. They spin: a wake-up costs as much as what is timed.
class Barrier {
 public:
  explicit Barrier(int parties) : parties_(parties) {}

  void wait() {
    const uint32_t round = round_.load();
    if (arrived_.fetch_add(1) + 1 == parties_) {
      arrived_.store(0);
      round_.store(round + 1);
      return;
    }
    for (int spins = 0; round_.load() == round; ++spins)
      if (spins > 1000) std::this_thread::yield();  // several parties may share a CPU
  }

 private:
  const int parties_;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> round_{0};
};

/// Runs body(thread, repeat) on one thread per CPU, `repeats` times, after one to warm up whose
/// number is -1; returns the wall times of the repeats in seconds. Threads that cannot be pinned
/// run where they are put.
template <class Body>
std::vector<double> time_on(const std::vector<int>& cpus, int repeats, const Body& body) {
  if (cpus.empty()) throw std::invalid_argument("cpus is empty; name at least one CPU.");
  const int num_threads = static_cast<int>(cpus.size());
  Barrier barrier(num_threads);
  std::vector<double> seconds;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < num_threads; ++thread) {
    threads.emplace_back([&, thread] {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(cpus[thread], &set);
      pthread_setaffinity_np(pthread_self(), sizeof set, &set);
      for (int repeat = -1; repeat < repeats; ++repeat) {
        barrier.wait();
        const Clock::time_point start = Clock::now();
        body(thread, repeat);
        barrier.wait();
        if (thread == 0 && repeat >= 0) seconds.push_back(seconds_since(start));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return seconds;
}

// -----------------------------------------------------------------------------------------
// bandwidth

typedef uint64_t Words __attribute__((vector_size(64)));
constexpr size_t kWords = sizeof(Words);

std::atomic<uint64_t> sink{0};  // keeps the reads from being optimised away

/// XOR of whole cache lines into *sum, in four chains, so that none waits for the one before. Words
/// go by pointer: how a call passes vectors of this size depends on the instruction set (-Wpsabi).
void fold(const uint8_t* p, size_t bytes, Words* sum) {
  Words a[4] = {};
  size_t i = 0;
  for (; i + 4 * kWords <= bytes; i += 4 * kWords)
    for (size_t j = 0; j < 4; ++j) a[j] ^= *reinterpret_cast<const Words*>(p + i + j * kWords);
  for (; i + kWords <= bytes; i += kWords) a[0] ^= *reinterpret_cast<const Words*>(p + i);
  *sum ^= a[0] ^ a[1] ^ a[2] ^ a[3];
}

uint64_t any_bit(const Words& words) { return words[0] ^ words[3] ^ words[5] ^ words[7]; }

/// Gives the array huge pages, where the system lets one ask. To be called before it is first
/// written.
bool advise_huge_pages(const py::array& array, bool huge) {
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(array.data());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (begin + static_cast<uintptr_t>(array.nbytes())) / kHuge * kHuge;
  if (first >= last) return false;
  return madvise(reinterpret_cast<void*>(first), last - first,
                 huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) == 0;
}

const uint8_t* aligned_begin(const Array<uint8_t>& buffer, size_t* bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(buffer.data());
  const uintptr_t first = (begin + 4095) / 4096 * 4096;
  const size_t skipped = first - begin;
  *bytes = static_cast<size_t>(buffer.nbytes()) < skipped ? 0 : buffer.nbytes() - skipped;
  return reinterpret_cast<const uint8_t*>(first);
}

/// GB/s of each repeat.
std::vector<double> rates(size_t bytes, std::vector<double> seconds) {
  for (double& value : seconds) value = static_cast<double>(bytes) / value / 1e9;
  return seconds;
}

std::vector<double> sequential_read(const Array<uint8_t>& buffer, const std::vector<int>& cpus,
                                    int repeats) {
  size_t bytes = 0;
  const uint8_t* p = aligned_begin(buffer, &bytes);
  const size_t share = bytes / std::max<size_t>(cpus.size(), 1) / 4096 * 4096;
  if (share == 0) throw std::invalid_argument("buffer has less than a page for each thread.");
  py::gil_scoped_release release;
  return rates(share * cpus.size(), time_on(cpus, repeats, [&](int thread, int) {
                 Words sum = {};
                 fold(p + share * thread, share, &sum);
                 sink ^= any_bit(sum);
               }));
}

/// The level is part of the instruction.
void prefetch_row(const uint8_t* row, size_t row_bytes, int cache_level) {
  if (cache_level == 1)
    for (size_t line = 0; line < row_bytes; line += 64) __builtin_prefetch(row + line, 0, 3);
  else
    for (size_t line = 0; line < row_bytes; line += 64) __builtin_prefetch(row + line, 0, 2);
}

/// Rows of row_bytes (a multiple of 64) at rows[repeat][i] * row_bytes, each prefetched `distance`
/// rows ahead and read whole; every thread takes one stretch of a repeat's rows. GB/s of each
/// repeat but the first, which warms up: other rows each time, since a repeated set may fit the
/// last-level cache.
std::vector<double> gather_rows(const Array<uint8_t>& buffer, const Array<int64_t>& rows,
                                size_t row_bytes, int distance, int cache_level,
                                const std::vector<int>& cpus) {
  size_t bytes = 0;
  const uint8_t* p = aligned_begin(buffer, &bytes);
  if (row_bytes == 0 || row_bytes % kWords != 0)
    throw std::invalid_argument("row_bytes must be a multiple of 64.");
  const int64_t num_rows = static_cast<int64_t>(bytes / row_bytes);
  const int64_t* ids = rows.data();
  if (rows.ndim() != 2) throw std::invalid_argument("rows must be [repeats, rows].");
  const int repeats = static_cast<int>(rows.shape(0)) - 1;
  const size_t per_repeat = rows.shape(1);
  const size_t share = per_repeat / std::max<size_t>(cpus.size(), 1);
  for (py::ssize_t i = 0; i < rows.size(); ++i)
    if (ids[i] < 0 || ids[i] >= num_rows)
      throw std::invalid_argument("row " + std::to_string(ids[i]) + " is not in the buffer.");
  if (share == 0) throw std::invalid_argument("there are fewer rows than threads.");
  py::gil_scoped_release release;
  return rates(share * cpus.size() * row_bytes, time_on(cpus, repeats, [&](int thread, int repeat) {
                 const int64_t* own = ids + (repeat + 1) * per_repeat + share * thread;
                 Words sum = {};
                 for (size_t i = 0; i < share; ++i) {
                   if (distance > 0 && i + distance < share)
                     prefetch_row(p + own[i + distance] * row_bytes, row_bytes, cache_level);
                   fold(p + own[i] * row_bytes, row_bytes, &sum);
                 }
                 sink ^= any_bit(sum);
               }));
}

// ---------------------------------------------------------------------------------- reference
// layout

/// The lookup as MagicPIG's published code lays it out, written anew from its description (arXiv
/// 2410.16179, section 4.3): per kv head and table int32 token ids sorted by bucket, with int32
/// offsets over the whole context; per query head one byte a token, which counts to two, and an id
/// is appended to the list when its count gets there.
class ReferenceIndex {
 public:
  /// codes: uint16 [num_tokens, num_kv_heads, L], each below 2**num_bits.
  ReferenceIndex(const Array<uint16_t>& codes, int num_bits) {
    if (codes.ndim() != 3) throw std::invalid_argument("codes must be [tokens, kv heads, L].");
    num_tokens_ = codes.shape(0);
    num_kv_heads_ = static_cast<int>(codes.shape(1));
    num_tables_ = static_cast<int>(codes.shape(2));
    num_buckets_ = int64_t{1} << num_bits;
    const int64_t lists = int64_t{num_kv_heads_} * num_tables_;
    const uint16_t* code = codes.data();
    for (int64_t i = 0; i < codes.size(); ++i)
      if (code[i] >= num_buckets_) throw std::invalid_argument("a code is not below 2**num_bits.");
    ids_ = uninitialised<int32_t>(lists * num_tokens_);
    offsets_.assign(lists * (num_buckets_ + 1), 0);
    py::gil_scoped_release release;
    std::vector<int32_t> next(num_buckets_);
    for (int64_t list = 0; list < lists; ++list) {
      int32_t* offsets = offsets_.data() + list * (num_buckets_ + 1);
      for (int64_t token = 0; token < num_tokens_; ++token)
        ++offsets[code[token * lists + list] + 1];
      for (int64_t b = 0; b < num_buckets_; ++b) offsets[b + 1] += offsets[b];
      std::copy(offsets, offsets + num_buckets_, next.begin());
      int32_t* ids = ids_.get() + list * num_tokens_;
      for (int64_t token = 0; token < num_tokens_; ++token)
        ids[next[code[token * lists + list]]++] = static_cast<int32_t>(token);
    }
  }

  int64_t num_bytes() const {
    return 4 * (int64_t{num_kv_heads_} * num_tables_ * num_tokens_ +
                static_cast<int64_t>(offsets_.size()));
  }

  /// query_codes: uint16 [num_q_heads, L]. Returns (ids per query head in the order of their second
  /// match, entries read by all heads, seconds summed over threads, wall seconds). Counters and
  /// lists are the index's own, so that nothing is allocated where it is timed.
  py::tuple lookup(const Array<uint16_t>& query_codes, const std::vector<int>& cpus) {
    if (query_codes.ndim() != 2 || query_codes.shape(1) != num_tables_ ||
        query_codes.shape(0) % num_kv_heads_ != 0)
      throw std::invalid_argument("query_codes must be [query heads, L].");
    const int num_q_heads = static_cast<int>(query_codes.shape(0));
    const int group = num_q_heads / num_kv_heads_;
    if (scratch_heads_ < num_q_heads) {
      counters_ = uninitialised<uint8_t>(num_q_heads * num_tokens_);
      found_ = uninitialised<int32_t>(num_q_heads * num_tokens_);
      scratch_heads_ = num_q_heads;
    }
    const uint16_t* codes = query_codes.data();
    std::vector<int64_t> sizes(num_q_heads), entries(num_q_heads);
    std::vector<double> busy(cpus.size());
    std::atomic<int> next_head{0};
    std::vector<double> wall;
    {
      py::gil_scoped_release release;
      wall = time_on(cpus, 1, [&](int thread, int repeat) {
        if (repeat < 0) return;  // nothing is to be warm
        const Clock::time_point start = Clock::now();
        for (int head; (head = next_head.fetch_add(1)) < num_q_heads;)
          sizes[head] =
              lookup_head(codes + int64_t{head} * num_tables_, head / group, head, &entries[head]);
        busy[thread] = seconds_since(start);
      });
    }
    py::list ids;
    int64_t all_entries = 0;
    double all_busy = 0;
    for (int head = 0; head < num_q_heads; ++head) {
      ids.append(Array<int32_t>(sizes[head], found_.get() + head * num_tokens_));
      all_entries += entries[head];
    }
    for (const double seconds : busy) all_busy += seconds;
    return py::make_tuple(ids, all_entries, all_busy, wall.at(0));
  }

 private:
  /// malloc's memory with huge pages asked for, since the project's own index asks for them.
  template <class T>
  static std::unique_ptr<T, void (*)(void*)> uninitialised(int64_t count) {
    constexpr size_t kHuge = size_t{1} << 21;
    const size_t bytes = (std::max<size_t>(count * sizeof(T), 1) + kHuge - 1) / kHuge * kHuge;
    void* memory = std::aligned_alloc(kHuge, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    madvise(memory, bytes, MADV_HUGEPAGE);
    return {static_cast<T*>(memory), std::free};
  }

  int64_t lookup_head(const uint16_t* codes, int kv_head, int head, int64_t* entries) {
    uint8_t* counters = counters_.get() + head * num_tokens_;
    int32_t* begin = found_.get() + head * num_tokens_;
    int32_t* found = begin;
    memset(counters, 0, num_tokens_);
    for (int table = 0; table < num_tables_; ++table) {
      const int64_t list = int64_t{kv_head} * num_tables_ + table;
      const int32_t* offsets = offsets_.data() + list * (num_buckets_ + 1) + codes[table];
      const int32_t* ids = ids_.get() + list * num_tokens_;
      *entries += offsets[1] - offsets[0];
      for (int32_t i = offsets[0]; i < offsets[1]; ++i) {
        const int32_t id = ids[i];
        if (__builtin_expect(counters[id] == 0, 1)) {
          counters[id] = 1;
        } else if (counters[id] == 1) {
          counters[id] = 2;
          *found++ = id;
        }
      }
    }
    return found - begin;
  }

  int64_t num_tokens_, num_buckets_;
  int num_kv_heads_, num_tables_, scratch_heads_ = 0;
  std::unique_ptr<int32_t, void (*)(void*)> ids_{nullptr, std::free};
  std::unique_ptr<uint8_t, void (*)(void*)> counters_{nullptr, std::free};
  std::unique_ptr<int32_t, void (*)(void*)> found_{nullptr, std::free};
  std::vector<int32_t> offsets_;
};

/// cuLaunchHostFunc without a device: the host function runs at once, in the caller's thread.
int launch_inline(void*, void (*function)(void*), void* data) {
  function(data);
  return 0;
}

}  // namespace

PYBIND11_MODULE(magicpig_bench_native, m) {
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("array"), py::arg("huge") = true);
  m.def("sequential_read", &sequential_read, py::arg("buffer"), py::arg("cpus"),
        py::arg("repeats"));
  m.def("gather_rows", &gather_rows, py::arg("buffer"), py::arg("rows"), py::arg("row_bytes"),
        py::arg("distance"), py::arg("cache_level"), py::arg("cpus"));
  py::class_<ReferenceIndex>(m, "ReferenceIndex")
      .def(py::init<const Array<uint16_t>&, int>(), py::arg("codes"), py::arg("num_bits"))
      .def_property_readonly("num_bytes", &ReferenceIndex::num_bytes)
      .def("lookup", &ReferenceIndex::lookup, py::arg("query_codes"), py::arg("cpus"));
  m.attr("launch_inline") = reinterpret_cast<uintptr_t>(&launch_inline);
}
