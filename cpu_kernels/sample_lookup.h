// The samples of a batch: which tokens of its middle each query head attends to.
#pragma once

#include <vector>

#include "kernels.h"
#include "workspace.h"

namespace magicpig {

/// The sample of one query head. Ascending positions, in a Lookup's memory.
struct SampleView {
  const int32_t* positions;
  int size;
  Threshold threshold;
};

/// Counts matches, by bucket where there is a segment and by code elsewhere, and picks the samples.
///
/// The work is cut into (request, kv head, stretch of tokens); who comes last at a (request, kv
/// head) picks its samples. They do not depend on how the work is cut.
class Lookup {
 public:
  /// Scratch of one thread.
  struct alignas(128) Scratch {
    Arena arena;
    std::vector<uint8_t> counters;
    std::vector<uint32_t> words;
    std::vector<uint8_t> scores;
    std::vector<size_t> num_scores;
    uint64_t lookup_ns = 0;
  };

  /// middles: of each request; one that is empty has no sample.
  Lookup(const Pages& pages, const Requests& requests, const std::vector<TokenRange>& middles,
         int num_q_heads, const SampleInput& input, const Kernels& kernels);

  /// What threads do for it; `input` has its codes when they start. scratch: one of each thread,
  /// reset by the caller before the next step.
  ThreadPool::Phase phase(int num_threads, std::vector<Scratch>& scratch);

  const SampleView& view(int request, int query_head) const {
    return views_[static_cast<size_t>(request) * num_q_heads_ + query_head];
  }
  /// Stretches long enough for a segment that have none.
  size_t unsealed_stretches() const { return unsealed_stretches_; }

 private:
  /// Tokens that are counted in one way.
  struct Stretch {
    int begin, end;                // begin is a tile's
    LshIndex::SegmentPtr segment;  // from begin on, of these tokens and more; null: by code
  };
  struct Plan {
    const int32_t* blocks;
    int num_tokens;
    TokenRange middle;
    int row_limit;
    std::vector<Stretch> stretches;
    size_t first_found;  // of its stretches' results
  };
  struct Task {
    int request;
    int kv_head;
    int stretch;
    int first_head;  // of the group
    int num_heads;
  };
  /// What a head found in a stretch.
  struct Found {
    const int32_t* positions;
    const uint8_t* scores;  // null where every match is taken
    int size;
  };

  Plan make_plan(const int32_t* blocks, int num_tokens, TokenRange middle);
  void cut_by_code(Plan& plan, int begin, int end) const;
  void make_tasks(int num_threads);
  void run_task(const Task& task, Scratch& scratch);
  Matches count(const Plan& plan, const Stretch& stretch, int kv_head, const uint16_t* codes,
                int num_heads, Scratch& scratch) const;
  void count_by_code(const Plan& plan, int kv_head, int begin, int end, const uint16_t* codes,
                     int num_heads, Matches matches) const;
  Matches matches_in(Scratch& scratch, int tokens, int num_heads) const;
  Found keep(const Plan& plan, const Stretch& stretch, const Matches& matches, int head,
             Scratch& scratch) const;
  void pick(int request, int query_head, Scratch& scratch);
  std::vector<Found> found_by(const Plan& plan, int query_head) const;
  SampleView pick_all(const std::vector<Found>& found, Scratch& scratch) const;
  SampleView pick_best(const std::vector<Found>& found, int limit, uint64_t phase,
                       Scratch& scratch) const;

  bool limited() const { return input_.rule->row_budget > 0; }
  const uint16_t* codes_of(int request, int query_head) const {
    return input_.query_codes + (static_cast<size_t>(request) * num_q_heads_ + query_head) *
                                    static_cast<size_t>(pages_.layout().num_tables);
  }
  size_t found_index(const Plan& plan, int query_head, size_t stretch) const {
    return plan.first_found + static_cast<size_t>(query_head) * plan.stretches.size() + stretch;
  }

  const Pages& pages_;
  const SampleInput& input_;
  const Kernels& kernels_;
  const int num_q_heads_;
  const int group_;
  const uint8_t min_matches_;
  std::vector<Plan> plans_;
  std::vector<Task> tasks_;
  std::vector<Found> found_;
  std::vector<SampleView> views_;
  std::unique_ptr<std::atomic<int>[]> tasks_left_;  // [num_reqs][num_kv_heads]
  size_t unsealed_stretches_ = 0;
};

/// Tie-breaker of a head's sample: where among the tokens that match equally well the choice
/// starts. Source: reference.tie_phase.
uint64_t tie_phase(uint64_t seed, int num_tokens, int query_head, const uint16_t* codes,
                   int num_tables);

}  // namespace magicpig
