// Threads that take the tasks of a job: our own, pinned and awake within microseconds, or those of
// the OpenMP runtime that the process holds already. Where a model's other layers run on these,
// they spin on their cores between two jobs, and threads of our own would wait for a core behind
// them.
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "magicpig.h"

namespace magicpig {
namespace {

using Microseconds = ThreadPool::Microseconds;

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

/// Spins until done() holds, at most for longest(), which is asked again and again; returns whether
/// it holds.
template <class Done, class Longest>
bool spin_until(const Done& done, const Longest& longest) {
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() - start < longest());
  return done();
}

/// For what other threads are about to end; whoever else wants this core gets it.
template <class Done>
void wait_until(const Done& done) {
  if (spin_until(done, [] { return ThreadPool::kSpin; })) return;
  while (!done()) std::this_thread::yield();
}

/// Pins a thread, whatever mask it inherited; false where the process may not use the CPU.
bool pin([[maybe_unused]] pthread_t thread, int cpu) {
#if defined(__linux__)
  if (cpu < 0 || cpu >= CPU_SETSIZE) return false;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  return pthread_setaffinity_np(thread, sizeof set, &set) == 0;
#else
  return cpu >= 0;  // without such a call, threads go where the system puts them
#endif
}

/// GOMP_parallel of the runtime that comes first in this process, null where there is none. Every
/// OpenMP runtime in use has this entry (GCC's own, LLVM's and Intel's for GCC's programs).
using Parallel = void (*)(void (*function)(void*), void* data, unsigned num_threads,
                          unsigned flags);
Parallel find_openmp() {
  constexpr const char* kEntry = "GOMP_parallel";
  if (void* found = dlsym(RTLD_DEFAULT, kEntry)) return reinterpret_cast<Parallel>(found);
  // A library that Python loaded for one module is not in the global scope.
  void* found = nullptr;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const std::string path = info->dlpi_name;
        const std::string name = path.substr(path.rfind('/') + 1);
        if (name.rfind("libgomp", 0) != 0 && name.rfind("libiomp5", 0) != 0 &&
            name.rfind("libomp", 0) != 0)
          return 0;
        void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
        if (library == nullptr) return 0;
        *static_cast<void**>(out) = dlsym(library, kEntry);
        dlclose(library);  // which stays loaded: others hold it
        return *static_cast<void**>(out) != nullptr ? 1 : 0;
      },
      &found);
  return reinterpret_cast<Parallel>(found);
}

/// The phases of one job, and the first exception of one.
class Job {
 public:
  explicit Job(const std::vector<ThreadPool::Phase>& phases)
      : phases_(phases), tasks_(new Tasks[phases.size()]) {}

  void run(int thread) {
    if (thread == 0)
      lead();
    else
      follow(thread);
  }

  void rethrow() {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  struct Tasks {
    size_t number;
    std::atomic<size_t> next{0};
    std::atomic<size_t> done{0};
  };

  void lead() {
    for (size_t phase = 0; phase < phases_.size() && !failed_.load(); ++phase) {
      Tasks& tasks = tasks_[phase];
      try {
        tasks.number = phases_[phase].start();
      } catch (...) {
        fail();
        break;
      }
      open_.store(phase + 1, std::memory_order_release);
      take_tasks(phase, 0);
      // The end of the last one is that of all who came.
      if (phase + 1 < phases_.size())
        wait_until([&] { return tasks.done.load(std::memory_order_acquire) == tasks.number; });
    }
    finished_.store(true, std::memory_order_release);
  }

  void follow(int thread) {
    for (size_t seen = 0; seen < phases_.size();) {
      wait_until([&] {
        return finished_.load(std::memory_order_acquire) ||
               open_.load(std::memory_order_acquire) != seen;
      });
      if (finished_.load(std::memory_order_acquire)) return;
      seen = open_.load(std::memory_order_acquire);
      take_tasks(seen - 1, thread);
    }
  }

  void take_tasks(size_t phase, int thread) {
    Tasks& tasks = tasks_[phase];
    for (;;) {
      const size_t task = tasks.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks.number) return;
      try {
        if (!failed_.load(std::memory_order_relaxed)) phases_[phase].body(task, thread);
      } catch (...) {
        fail();
      }
      tasks.done.fetch_add(1, std::memory_order_acq_rel);
    }
  }

  void fail() {
    if (!failed_.exchange(true)) error_ = std::current_exception();
  }

  const std::vector<ThreadPool::Phase>& phases_;
  const std::unique_ptr<Tasks[]> tasks_;  // of each phase
  std::atomic<size_t> open_{0};           // phases that have started
  std::atomic<bool> finished_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_ = nullptr;
};

/// Throws when a CPU cannot be pinned to. A thread of its own tries them all, because the caller's
/// mask does not say what the process may use, and must not change.
void check_cpus(const std::vector<int>& cpus) {
  if (cpus.empty())
    throw std::invalid_argument("cpus is empty, but a pool needs at least one CPU; name one.");
  const int* forbidden = nullptr;
  std::thread([&] {
    for (const int& cpu : cpus)
      if (forbidden == nullptr && !pin(pthread_self(), cpu)) forbidden = &cpu;
  }).join();
  if (forbidden != nullptr)
    throw std::invalid_argument("CPU " + std::to_string(*forbidden) +
                                " of cpus cannot be pinned to; name only CPUs that this process's "
                                "cpuset allows.");
}

}  // namespace

struct ThreadPool::Workers {
  explicit Workers(const ThreadPool& owner) : pool(owner) {}

  const ThreadPool& pool;
  std::vector<std::thread> threads;
  std::mutex run_mutex;

  const std::function<void(int)>* body = nullptr;  // set only while the gate is closed and empty

  // Workers inside the current job, and a bit that keeps late ones out of a finished job.
  static constexpr uint32_t kClosed = 1u << 31;
  std::atomic<uint32_t> gate{kClosed};
  std::atomic<uint64_t> generation{0};
  std::atomic<bool> stopping{false};

  std::mutex sleep_mutex;
  std::condition_variable wake;
  std::condition_variable left;
  std::atomic<int> sleepers{0};
  std::atomic<uint64_t> wakes{0};

  ~Workers() {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex);
      stopping.store(true);
    }
    wake.notify_all();
    for (std::thread& thread : threads) thread.join();
  }

  auto longest_spin() const {
    return [this] {
      const bool guests = pool.guests_.load(std::memory_order_relaxed) > 0;
      return guests ? std::min(kSpin, pool.spin_) : pool.spin_;
    };
  }

  void enter(const std::function<void(int)>& job_body) {
    std::lock_guard<std::mutex> one_at_a_time(run_mutex);
    body = &job_body;
    gate.store(0);
    // Sequentially consistent, like the worker's `sleepers` and `generation`: one sees the other.
    generation.fetch_add(1);
    if (sleepers.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(sleep_mutex);
      }
      wake.notify_all();
      wakes.fetch_add(1, std::memory_order_relaxed);
    }

    job_body(0);

    gate.fetch_or(kClosed);
    const auto empty = [this] { return gate.load() == kClosed; };
    if (!spin_until(empty, longest_spin())) {
      std::unique_lock<std::mutex> lock(sleep_mutex);
      left.wait(lock, empty);
    }
  }

  void work(int thread) {
    uint64_t seen = 0;
    const auto called = [&] { return generation.load() != seen || stopping.load(); };
    for (;;) {
      if (!spin_until(called, longest_spin())) {
        std::unique_lock<std::mutex> lock(sleep_mutex);
        sleepers.fetch_add(1);
        wake.wait(lock, called);
        sleepers.fetch_sub(1);
      }
      if (stopping.load()) return;
      seen = generation.load();

      uint32_t inside = gate.load();
      while (!(inside & kClosed) && !gate.compare_exchange_weak(inside, inside + 1)) {
      }
      if (inside & kClosed) continue;
      (*body)(thread);
      if (gate.fetch_sub(1) == (kClosed | 1)) {
        {
          std::lock_guard<std::mutex> lock(sleep_mutex);
        }
        left.notify_one();
      }
    }
  }
};

bool pin_this_thread(int cpu) { return pin(pthread_self(), cpu); }

ThreadPool::ThreadPool(const std::vector<int>& cpus, Microseconds spin)
    : spin_(spin), num_threads_(static_cast<int>(cpus.size())), owner_pid_(getpid()) {
  check_cpus(cpus);
  workers_ = std::make_unique<Workers>(*this);
  for (int thread = 1; thread < num_threads_; ++thread) {
    workers_->threads.emplace_back(&Workers::work, workers_.get(), thread);
    pin(workers_->threads.back().native_handle(), cpus[thread]);
  }
}

ThreadPool::~ThreadPool() {
  // The threads do not exist in a forked child, where joining them or destroying what they wait on
  // would hang: leave it all behind.
  if (getpid() != owner_pid_) static_cast<void>(workers_.release());
}

ThreadPool::ThreadPool(int num_openmp_threads)
    : spin_(0), num_threads_(num_openmp_threads), owner_pid_(getpid()), openmp_(find_openmp()) {
  if (openmp_ == nullptr)
    throw std::runtime_error(
        "This process holds no OpenMP runtime; import torch before, or make a pool of CPUs.");
}

int ThreadPool::num_sleeping() const { return workers_ ? workers_->sleepers.load() : 0; }

uint64_t ThreadPool::num_wakes() const { return workers_ ? workers_->wakes.load() : 0; }

void ThreadPool::enter(const std::function<void(int)>& body) {
  if (getpid() != owner_pid_)
    throw std::runtime_error("This thread pool was made before fork(); make one in the child.");
  if (openmp_ == nullptr) return workers_->enter(body);
  // OpenMP's threads number themselves as they come, but for the caller.
  struct Team {
    const std::function<void(int)>& body;
    const int num_threads;
    const std::thread::id caller = std::this_thread::get_id();
    std::atomic<int> next_thread{1};

    void join() {
      const int thread = std::this_thread::get_id() == caller
                             ? 0
                             : next_thread.fetch_add(1, std::memory_order_relaxed);
      if (thread < num_threads) body(thread);
    }
  } team = {body, num_threads_};
  openmp_([](void* data) { static_cast<Team*>(data)->join(); }, &team,
          static_cast<unsigned>(num_threads_), 0);
}

void ThreadPool::run(const std::vector<Phase>& phases) {
  if (num_threads_ == 1) {
    for (const Phase& phase : phases) {
      const size_t num_tasks = phase.start();
      for (size_t task = 0; task < num_tasks; ++task) phase.body(task, 0);
    }
    return;
  }
  Job job(phases);
  enter([&job](int thread) { job.run(thread); });
  job.rethrow();
}

void ThreadPool::run(size_t num_tasks, const Body& body) {
  if (num_threads_ == 1 || num_tasks <= 1) {
    for (size_t task = 0; task < num_tasks; ++task) body(task, 0);
    return;
  }
  run({{[num_tasks] { return num_tasks; }, body}});
}

}  // namespace magicpig
