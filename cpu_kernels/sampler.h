// How a decode step chooses the rows of a middle that it reads, and attends to them: by the paper's
// buckets (bucket_sampler.cpp) or by signatures (signature_sampler.cpp).
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"
#include "workspace.h"

namespace magicpig {

/// What a sampler knows of a step.
struct StepView {
  const Pages& pages;
  const Requests& requests;
  const std::vector<TokenRange>& middles;  // of each request; empty: attended exactly
  const float* queries;                    // [num_reqs][num_q_heads][head_size]
  int num_q_heads;
  float scale;

  size_t group() const { return static_cast<size_t>(num_q_heads / pages.num_kv_heads()); }
  size_t num_queries() const {
    return static_cast<size_t>(requests.size) * static_cast<size_t>(num_q_heads);
  }
  /// The first query head of a group: of queries, and of all that has one of each.
  size_t first_query(int request, int kv_head) const {
    return static_cast<size_t>(request) * static_cast<size_t>(num_q_heads) +
           static_cast<size_t>(kv_head) * group();
  }
  const float* queries_of(int request, int kv_head) const {
    return queries + first_query(request, kv_head) * static_cast<size_t>(pages.layout().head_size);
  }
};

/// One kv head's rows of a part of a request's middle.
struct SampledPart {
  int request;
  int kv_head;
  TokenRange tokens;
};

class Sampler {
 public:
  virtual ~Sampler() = default;

  /// Whose rows are sampled, of a request of so many tokens.
  virtual TokenRange middle(int num_tokens) const = 0;
  /// Tokens of a part at least.
  virtual int part_tokens() const = 0;
  /// Work before the rows are attended to. step lives as long as the sampler; what is taken from
  /// the arena, till the step's end.
  virtual std::vector<ThreadPool::Phase> plan(const StepView& step, Arena& arena,
                                              ThreadPool& pool) = 0;
  /// After that work, on one thread.
  virtual void start_attention() {}
  /// Adds a part's rows to the softmax and acc of each head of the group. args: what does not
  /// depend on rows, of the group's first head; returns the rows of each head in `rows`.
  virtual void attend(const SampledPart& part, AttendArgs args, int32_t* rows, int thread) = 0;
  /// What the step measured, into its output.
  virtual void report(DecodeOutput& output) const = 0;
};

/// The batch's queries as floats: to [num_reqs][num_q_heads][head_size].
void read_queries(const Pages& pages, const Requests& requests, const DecodeInput& input,
                  float* to);

/// Of the calling thread's workspace. exact_below and queries are the step's concern.
std::unique_ptr<Sampler> make_bucket_sampler(const DecodeInput& input, Isa isa);
std::unique_ptr<Sampler> make_signature_sampler(const DecodeInput& input, Isa isa);

}  // namespace magicpig
