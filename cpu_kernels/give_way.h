// Builders stop while a decode step runs: a step takes a millisecond, and a thread that shares its
// cores for a part of that, or its memory bandwidth, makes the whole step wait.
#pragma once

#include <chrono>
#include <thread>

#include "magicpig.h"
#include "timing.h"

namespace magicpig {

/// Of one thread that does work in the background.
class GiveWay {
 public:
  /// steps: the pool of what goes first; null: nothing does.
  explicit GiveWay(const ThreadPool* steps) : steps_(steps) {}

  /// Called every few tens of microseconds; sleeps while the pool is in use. Where the pool is
  /// never seen at rest, a thread works for kSlice after each kPatience, so that what it builds
  /// does come: fewer than one step in a hundred meets that.
  void operator()() {
    if (steps_ == nullptr || !steps_->in_use()) return;
    const Clock::time_point now = Clock::now();
    if (now < free_until_) return;
    const Clock::time_point deadline = now + kPatience;
    do {
      std::this_thread::sleep_for(kNap);
      if (!steps_->in_use()) return;
    } while (Clock::now() < deadline);
    free_until_ = Clock::now() + kSlice;
  }

 private:
  /// Not a wake-up by the step, which would have to pay for it.
  static constexpr std::chrono::microseconds kNap{250};
  static constexpr std::chrono::milliseconds kPatience{200};
  static constexpr std::chrono::milliseconds kSlice{1};

  const ThreadPool* steps_;
  Clock::time_point free_until_{};
};

}  // namespace magicpig
