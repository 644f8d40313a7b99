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
  /// steps: the pool of what goes first; null: nothing does. can_wait: whether the work may come
  /// late; else it goes on in small turns while steps run.
  GiveWay(const ThreadPool* steps, bool can_wait)
      : steps_(steps),
        patience_(can_wait ? kLongPatience : kPatience),
        turn_(can_wait ? kLongTurn : kTurn) {}

  /// Called every few tens of microseconds. Sleeps while the pool is in use, but works for a turn
  /// whenever its patience is at an end, so that what it builds does come. A long turn delays a
  /// step, but one in a hundred at most meets one; a small one does not show beside a step.
  void operator()() {
    if (steps_ == nullptr || !steps_->in_use()) return;
    const Clock::time_point now = Clock::now();
    if (now < free_until_) return;
    const Clock::time_point deadline = now + patience_;
    do {
      std::this_thread::sleep_for(kNap);
      if (!steps_->in_use()) return;
    } while (Clock::now() < deadline);
    free_until_ = Clock::now() + turn_;
  }

 private:
  /// Not a wake-up by the step, which would have to pay for it.
  static constexpr std::chrono::microseconds kNap{250};
  static constexpr std::chrono::microseconds kPatience{2000}, kLongPatience{200'000};
  static constexpr std::chrono::microseconds kTurn{100}, kLongTurn{1000};

  const ThreadPool* steps_;
  std::chrono::microseconds patience_, turn_;
  Clock::time_point free_until_{};
};

}  // namespace magicpig
