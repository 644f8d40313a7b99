// Segments, built by a thread that decode never waits for.
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <stdexcept>
#include <thread>
#include <unordered_map>
#include <utility>

#include "stream.h"

namespace magicpig {
namespace {

/// Of the calling thread; the threads that it starts inherit it. Advice: no harm where it fails.
void lower_priority() {
#if defined(__linux__)  // elsewhere it would be the whole process
  constexpr int kNice = 10;
  static_cast<void>(setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + kNice));
#endif
}

}  // namespace

struct SegmentBuilder::Worker {
  FirstError& errors;

  std::mutex mutex;  // guards what follows
  std::condition_variable changed;
  std::deque<LshIndex*> queue;
  std::unordered_map<const LshIndex*, std::vector<LshIndex::Stretch>> asked;  // of the queue
  LshIndex* running = nullptr;
  bool cancelled = false;  // what runs
  bool stopping = false;
  bool started = false;
  std::exception_ptr start_error;

  std::thread thread;  // last: it uses all of the above

  Worker(FirstError& first_error, const std::vector<int>& cpus)
      : errors(first_error), thread([this, cpus] { work(cpus); }) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return started; });
    if (!start_error) return;
    lock.unlock();
    thread.join();
    std::rethrow_exception(start_error);
  }

  ~Worker() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stopping = true;
      cancelled = true;
    }
    changed.notify_all();
    thread.join();
  }

  void work(const std::vector<int>& cpus) {
    std::unique_ptr<ThreadPool> pool;
    std::exception_ptr error;
    try {
      lower_priority();
      pool = std::make_unique<ThreadPool>(cpus);
      pin_this_thread(cpus[0]);
    } catch (...) {
      error = std::current_exception();
    }
    std::unique_lock<std::mutex> lock(mutex);
    started = true;
    start_error = error;
    changed.notify_all();
    if (error) return;

    for (;;) {
      changed.wait(lock, [this] { return stopping || !queue.empty(); });
      if (stopping) return;
      running = queue.front();
      queue.pop_front();
      const auto entry = asked.find(running);
      const std::vector<LshIndex::Stretch> stretches = std::move(entry->second);
      asked.erase(entry);
      cancelled = false;
      build(stretches, *pool, lock);
      running = nullptr;
      changed.notify_all();
    }
  }

  /// Called and left with the lock held.
  void build(const std::vector<LshIndex::Stretch>& stretches, ThreadPool& pool,
             std::unique_lock<std::mutex>& lock) {
    LshIndex& index = *running;
    lock.unlock();
    try {
      index.build({}, pool);  // frees what is stale
      for (const LshIndex::Stretch& stretch : stretches) {
        lock.lock();
        const bool stop = cancelled;
        lock.unlock();
        if (stop) break;
        index.build({stretch}, pool);  // one by one: each serves as soon as it is there
      }
    } catch (...) {
      errors.note(std::current_exception());
    }
    lock.lock();
  }
};

SegmentBuilder::SegmentBuilder(const std::vector<int>& cpus)
    : owner_pid_(getpid()), worker_(std::make_unique<Worker>(errors_, cpus)) {}

SegmentBuilder::~SegmentBuilder() {
  // As in ThreadPool: the thread does not exist in a forked child.
  if (getpid() != owner_pid_) static_cast<void>(worker_.release());
}

void SegmentBuilder::ask(LshIndex& index, std::vector<LshIndex::Stretch> stretches) {
  {
    std::lock_guard<std::mutex> lock(worker_->mutex);
    const auto [entry, is_new] = worker_->asked.try_emplace(&index);
    if (is_new) worker_->queue.push_back(&index);
    // Every build frees what is stale: a wish for that alone replaces nothing.
    if (!stretches.empty()) entry->second = std::move(stretches);
  }
  worker_->changed.notify_all();
}

void SegmentBuilder::forget(const LshIndex& index) {
  if (getpid() != owner_pid_) return;
  std::unique_lock<std::mutex> lock(worker_->mutex);
  if (worker_->asked.erase(&index) > 0)
    worker_->queue.erase(std::find(worker_->queue.begin(), worker_->queue.end(), &index));
  if (worker_->running == &index) worker_->cancelled = true;
  worker_->changed.wait(lock, [&] { return worker_->running != &index; });
  worker_->changed.notify_all();  // drain() may wait for the queue alone
}

void SegmentBuilder::drain() {
  if (getpid() != owner_pid_)
    throw std::runtime_error("This segment builder was made before fork(); make one in the child.");
  std::unique_lock<std::mutex> lock(worker_->mutex);
  worker_->changed.wait(lock,
                        [&] { return worker_->queue.empty() && worker_->running == nullptr; });
}

size_t SegmentBuilder::pending() const {
  std::lock_guard<std::mutex> lock(worker_->mutex);
  return worker_->queue.size() + (worker_->running != nullptr);
}

}  // namespace magicpig
