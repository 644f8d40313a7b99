// Segments, built by a thread that decode never waits for.
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <map>
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
  // Who wakes from a nap takes no core from a step then: it would keep it until the next tick.
  const sched_param none = {};
  static_cast<void>(sched_setscheduler(0, SCHED_BATCH, &none));
  constexpr int kNice = 10;
  static_cast<void>(setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + kNice));
#endif
}

}  // namespace

struct SegmentBuilder::Worker {
  /// What an index waits for, smallest first, by size and last block. A later wish for a place
  /// replaces an earlier one: either both are for the same blocks or those have a new owner.
  using Wishes = std::map<std::pair<size_t, int32_t>, LshIndex::Stretch>;

  FirstError& errors;
  const std::shared_ptr<const ThreadPool> gives_way_to;

  std::mutex mutex;  // guards what follows
  std::condition_variable changed;
  std::deque<LshIndex*> queue;                        // in the order in which they came to wait
  std::unordered_map<const LshIndex*, Wishes> asked;  // of the queue; none: free what is stale
  LshIndex* running = nullptr;
  bool stopping = false;
  bool started = false;
  std::exception_ptr start_error;

  std::thread thread;  // last: it uses all of the above

  Worker(FirstError& first_error, const std::vector<int>& cpus,
         std::shared_ptr<const ThreadPool> steps)
      : errors(first_error), gives_way_to(std::move(steps)), thread([this, cpus] { work(cpus); }) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return started; });
    if (!start_error) return;
    lock.unlock();
    thread.join();
    std::rethrow_exception(start_error);
  }

  ~Worker() { stop(); }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stopping = true;
      queue.clear();
      asked.clear();
    }
    changed.notify_all();
    if (thread.joinable()) thread.join();
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
      const std::vector<LshIndex::Stretch> stretches = next();  // sets running
      lock.unlock();
      try {
        const ThreadPool::Guest on_its_cpus(gives_way_to.get());
        running->build(stretches, *pool, gives_way_to.get());  // frees what is stale, too
      } catch (...) {
        errors.note(std::current_exception());
      }
      lock.lock();
      running = nullptr;
      changed.notify_all();
    }
  }

  /// Takes the smallest stretch of all, or a wish for nothing but stale memory: small ones are the
  /// ends of requests, compared by code until then, while large ones only replace segments that
  /// serve. Among equals one layer comes after the other, so that a merge that all need in the same
  /// step is not made for all of them at once.
  std::vector<LshIndex::Stretch> next() {
    const auto smallest = [this](const LshIndex* index) {
      const Wishes& wishes = asked.at(index);
      return wishes.empty() ? 0 : wishes.begin()->first.first;
    };
    const auto turn = std::min_element(
        queue.begin(), queue.end(),
        [&](const LshIndex* a, const LshIndex* b) { return smallest(a) < smallest(b); });
    running = *turn;
    Wishes& wishes = asked.at(running);
    std::vector<LshIndex::Stretch> stretches;
    if (!wishes.empty()) {
      stretches.push_back(std::move(wishes.begin()->second));
      wishes.erase(wishes.begin());
    }
    if (wishes.empty()) {
      asked.erase(running);
      queue.erase(turn);
    }
    return stretches;
  }

  /// Adds a wish, and drops smaller ones that it covers: their segments would be replaced at once.
  static void add(Wishes& wishes, LshIndex::Stretch stretch) {
    for (auto wish = wishes.begin(); wish != wishes.end() && wish->first.first < stretch.size();) {
      const size_t size = wish->first.first;
      for (size_t end = size; end <= stretch.size(); end += size) {
        const auto covered = wishes.find({size, stretch[end - 1].block});
        if (covered != wishes.end() &&
            std::equal(covered->second.begin(), covered->second.end(),
                       stretch.begin() + static_cast<ptrdiff_t>(end - size)))
          wishes.erase(covered);
      }
      wish = wishes.lower_bound({size + 1, INT32_MIN});
    }
    const std::pair<size_t, int32_t> place = {stretch.size(), stretch.back().block};
    wishes.insert_or_assign(place, std::move(stretch));
  }
};

SegmentBuilder::SegmentBuilder(const std::vector<int>& cpus,
                               std::shared_ptr<const ThreadPool> gives_way_to)
    : owner_pid_(getpid()),
      worker_(std::make_unique<Worker>(errors_, cpus, std::move(gives_way_to))) {}

SegmentBuilder::~SegmentBuilder() {
  // As in ThreadPool: the thread does not exist in a forked child.
  if (getpid() != owner_pid_) static_cast<void>(worker_.release());
}

void SegmentBuilder::ask(LshIndex& index, const Requests& requests) {
  std::vector<LshIndex::Stretch> missing = index.missing(requests);
  if (missing.empty() && !index.may_hold_stale()) return;
  {
    std::lock_guard<std::mutex> lock(worker_->mutex);
    if (worker_->stopping) return;
    const auto [entry, is_new] = worker_->asked.try_emplace(&index);
    if (is_new) worker_->queue.push_back(&index);
    for (LshIndex::Stretch& stretch : missing) Worker::add(entry->second, std::move(stretch));
  }
  worker_->changed.notify_all();
}

void SegmentBuilder::forget(const LshIndex& index) {
  if (getpid() != owner_pid_) return;
  std::unique_lock<std::mutex> lock(worker_->mutex);
  if (worker_->asked.erase(&index) > 0)
    worker_->queue.erase(std::find(worker_->queue.begin(), worker_->queue.end(), &index));
  worker_->changed.wait(lock, [&] { return worker_->running != &index; });
  worker_->changed.notify_all();  // drain() may wait for the queue alone
}

void SegmentBuilder::drain() {
  check_owner();
  std::unique_lock<std::mutex> lock(worker_->mutex);
  worker_->changed.wait(lock,
                        [&] { return worker_->queue.empty() && worker_->running == nullptr; });
}

void SegmentBuilder::close() {
  check_owner();
  worker_->stop();
}

size_t SegmentBuilder::pending() const {
  std::lock_guard<std::mutex> lock(worker_->mutex);
  const LshIndex* running = worker_->running;
  return worker_->asked.size() + (running != nullptr && worker_->asked.count(running) == 0);
}

void SegmentBuilder::check_owner() const {
  if (getpid() != owner_pid_)
    throw std::runtime_error("This segment builder was made before fork(); make one in the child.");
}

}  // namespace magicpig
