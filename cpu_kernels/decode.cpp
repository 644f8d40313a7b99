// One decode step: queries as floats and as codes, what each query head attends to, how that is
// split into tasks, and how their results are merged.
//
// A task is (request, kv head, part). Parts depend on the request alone and their results merge in
// one order, so that the output is the same for any number of threads, and any batch.
#include <algorithm>
#include <cmath>
#include <limits>

#include "divide_up.h"
#include "elements.h"
#include "sampler.h"
#include "timing.h"

namespace magicpig {
namespace {

/// Static rows gathered before they are attended to; a multiple of the kernel's tile.
constexpr int kRowBatch = 1024;

// Parts are few enough that merging a long request stays about one percent of its work.
constexpr int kStaticPartRows = 1024;
constexpr int kMaxStaticParts = 64;
constexpr int kMaxSampledParts = 32;
/// One step in so many of a request weighs a kv head's errors, which adds 7 to 20 % to that step;
/// kv heads take turns.
constexpr int kErrorBarSteps = 16;

/// Parts begin at multiples of this.
constexpr int kPartAlignment = kSignatureBlock;

/// What one request needs: its static rows (sink and window, or everything where exact), then its
/// middle in parts of so many tokens.
struct Plan {
  const int32_t* blocks;
  int num_tokens;
  bool exact;
  TokenRange middle;  // empty where exact

  int num_static_rows() const { return num_tokens - middle.size(); }
  int static_row(int i) const { return i < middle.begin ? i : i - middle.begin + middle.end; }

  int static_part_rows;
  int num_static_parts;
  int sampled_part_tokens = 0;
  int num_sampled_parts = 0;

  int num_parts() const { return num_static_parts + num_sampled_parts; }
  int first_part_token() const { return middle.begin / kPartAlignment * kPartAlignment; }
  TokenRange sampled_part(int part) const {
    const int begin = first_part_token() + part * sampled_part_tokens;
    return {std::max(begin, middle.begin), std::min(begin + sampled_part_tokens, middle.end)};
  }
};

Plan make_plan(const Requests& requests, int request, const DecodeInput& input,
               const Sampler* sampler) {
  Plan plan;
  plan.blocks = requests.blocks(request);
  plan.num_tokens = requests.seq_lens[request];
  plan.exact = true;
  plan.middle = {plan.num_tokens, plan.num_tokens};
  if (sampler != nullptr) {
    const TokenRange middle = sampler->middle(plan.num_tokens);
    if (middle.size() >= input.exact_below) {
      plan.exact = false;
      plan.middle = middle;
    }
  }
  plan.static_part_rows =
      std::max(kStaticPartRows, divide_up(plan.num_static_rows(), kMaxStaticParts));
  plan.num_static_parts = divide_up(plan.num_static_rows(), plan.static_part_rows);
  if (plan.exact) return plan;
  const int tokens = plan.middle.end - plan.first_part_token();
  const int least = std::max(sampler->part_tokens(), divide_up(tokens, kMaxSampledParts));
  plan.sampled_part_tokens = divide_up(least, kPartAlignment) * kPartAlignment;
  plan.num_sampled_parts = divide_up(tokens, plan.sampled_part_tokens);
  return plan;
}

struct Task {
  int request;
  int kv_head;
  int part;
};

/// What a task leaves for the merge, per query head of its group.
struct Partial {
  Softmax softmax;
  int32_t rows;
};

/// What one thread needs, kept from step to step.
struct alignas(128) Scratch {
  std::vector<const uint8_t*> rows;
  std::vector<Softmax> softmax;   // of a group
  std::vector<int32_t> num_rows;  // likewise
  uint64_t attention_ns = 0;
};

struct Workspace {
  std::vector<Scratch> attention;
  Arena arena;  // of the calling thread

  void start(int num_threads) {
    const size_t threads = static_cast<size_t>(num_threads);
    if (attention.size() < threads) attention.resize(threads);
    arena.reset();
    for (Scratch& scratch : attention) scratch.attention_ns = 0;
  }
};

std::unique_ptr<Sampler> make_sampler(const DecodeInput& input, Isa isa) {
  if (input.signatures != nullptr) return make_signature_sampler(input, isa);
  if (input.sample != nullptr) return make_bucket_sampler(input, isa);
  return nullptr;
}

/// Where a request's query and output are.
ptrdiff_t token_of(const DecodeInput& input, size_t request) {
  return input.tokens == nullptr ? static_cast<ptrdiff_t>(request) : input.tokens[request];
}

class Step {
 public:
  Step(const Pages& pages, const Requests& requests, const DecodeInput& input, Isa isa,
       DecodeOutput& output, Workspace& workspace)
      : pages_(pages),
        requests_(requests),
        input_(input),
        output_(output),
        kernels_(kernels_of(isa)),
        workspace_(workspace),
        group_(static_cast<size_t>(input.num_q_heads / pages.num_kv_heads())),
        head_size_(static_cast<size_t>(pages.layout().head_size)),
        sampler_(make_sampler(input, isa)),
        view_{pages, requests, middles_, nullptr, input.num_q_heads, input.scale} {
    size_t num_parts = 0;
    for (int r = 0; r < requests.size; ++r) {
      plans_.push_back(make_plan(requests, r, input, sampler_.get()));
      middles_.push_back(plans_.back().middle);
      first_part_.push_back(num_parts);
      num_parts += static_cast<size_t>(plans_.back().num_parts() * pages.num_kv_heads());
      for (int head = 0; head < pages.num_kv_heads(); ++head)
        for (int part = 0; part < plans_.back().num_parts(); ++part)
          tasks_.push_back({r, head, part});
    }
    float* const queries = workspace.arena.take<float>(view_.num_queries() * head_size_);
    read_queries(pages, requests, input, queries);
    view_.queries = queries;
    partials_ = workspace.arena.take<Partial>(num_parts * group_);
    acc_ = workspace.arena.take<float>(num_parts * group_ * head_size_);
    if (input.signatures != nullptr) {
      errors_ = workspace.arena.take<ErrorSums>(num_parts * group_);
      error_acc_ = workspace.arena.take<float>(num_parts * group_ * head_size_);
      output.error_bars.assign(view_.num_queries(), std::numeric_limits<float>::quiet_NaN());
    }
    const size_t groups = static_cast<size_t>(requests.size * pages.num_kv_heads());
    parts_left_.reset(new std::atomic<int>[groups]);
    for (int r = 0; r < requests.size; ++r)
      for (int head = 0; head < pages.num_kv_heads(); ++head)
        parts_left_[group_index(r, head)].store(plans_[static_cast<size_t>(r)].num_parts());
  }

  void run(ThreadPool& pool) {
    std::vector<ThreadPool::Phase> phases;
    if (sampler_ != nullptr) phases = sampler_->plan(view_, workspace_.arena, pool);
    phases.push_back({[this] {
                        if (sampler_ != nullptr) sampler_->start_attention();
                        return tasks_.size();
                      },
                      [this](size_t i, int thread) {
                        const Task& task = tasks_[i];
                        run_task(task, thread);
                        // The last part of a group to finish merges it; which thread that is
                        // changes nothing.
                        const size_t index = group_index(task.request, task.kv_head);
                        if (parts_left_[index].fetch_sub(1, std::memory_order_acq_rel) == 1)
                          merge(task.request, task.kv_head);
                      }});
    pool.run(phases);
    for (size_t r = 0; r < plans_.size(); ++r)  // no token, no task
      if (plans_[r].num_parts() == 0)
        for (int head = 0; head < pages_.num_kv_heads(); ++head) merge(static_cast<int>(r), head);
    if (sampler_ != nullptr) sampler_->report(output_);
    for (const TokenRange& middle : middles_) output_.middles.push_back(middle.size());
    for (const Scratch& s : workspace_.attention) output_.attention_ns += s.attention_ns;
  }

 private:
  size_t group_index(int request, int kv_head) const {
    return static_cast<size_t>(request * pages_.num_kv_heads() + kv_head);
  }
  size_t first_query_head(int request, int kv_head) const {
    return group_index(request, kv_head) * group_;
  }
  /// Index of a part's first partial; its heads follow.
  size_t partial_index(const Task& task) const {
    const int parts = plans_[task.request].num_parts();
    return (first_part_[task.request] + static_cast<size_t>(task.kv_head * parts + task.part)) *
           group_;
  }

  void run_task(const Task& task, int thread) {
    const Plan& plan = plans_[static_cast<size_t>(task.request)];
    Scratch& scratch = workspace_.attention[static_cast<size_t>(thread)];
    Partial* partials = &partials_[partial_index(task)];
    scratch.softmax.assign(group_, Softmax{kNoMax, 0.0f});
    scratch.num_rows.assign(group_, 0);
    AttendArgs args = {};
    args.row_type = pages_.layout().row_type;
    args.head_size = pages_.layout().head_size;
    args.scale = input_.scale;
    args.queries = view_.queries_of(task.request, task.kv_head);
    args.num_heads = static_cast<int>(group_);
    args.softmax = scratch.softmax.data();
    args.acc = &acc_[partial_index(task) * head_size_];
    std::fill(args.acc, args.acc + group_ * head_size_, 0.0f);

    const Clock::time_point start = Clock::now();
    if (task.part < plan.num_static_parts) {
      attend_static(task, plan, args, scratch);
    } else {
      if (has_error_bar(plan, task.kv_head)) {
        args.errors = &errors_[partial_index(task)];
        args.error_acc = &error_acc_[partial_index(task) * head_size_];
        std::fill(args.errors, args.errors + group_, ErrorSums{0.0f, 0.0f});
        std::fill(args.error_acc, args.error_acc + group_ * head_size_, 0.0f);
      }
      const TokenRange tokens = plan.sampled_part(task.part - plan.num_static_parts);
      sampler_->attend({task.request, task.kv_head, tokens}, args, scratch.num_rows.data(), thread);
    }
    for (size_t head = 0; head < group_; ++head)
      partials[head] = {scratch.softmax[head], scratch.num_rows[head]};
    scratch.attention_ns += nanoseconds_since(start);
  }

  /// The whole group over a run of the static rows.
  void attend_static(const Task& task, const Plan& plan, AttendArgs& args, Scratch& scratch) {
    scratch.rows.resize(kRowBatch);
    args.rows = scratch.rows.data();
    const int begin = task.part * plan.static_part_rows;
    const int end = std::min(begin + plan.static_part_rows, plan.num_static_rows());
    for (int i = begin; i < end; i += kRowBatch) {
      args.num_rows = std::min(kRowBatch, end - i);
      for (int r = 0; r < args.num_rows; ++r)
        scratch.rows[static_cast<size_t>(r)] =
            pages_.row(plan.blocks, task.kv_head, plan.static_row(i + r));
      kernels_.attend(args);
    }
  }

  /// reference.merge over all parts, in their order.
  void merge(int request, int kv_head) {
    const Plan& plan = plans_[request];
    const size_t first = partial_index({request, kv_head, 0});
    alignas(64) float out[kMaxHeadSize];
    uint8_t* const token =
        output_.out + token_of(input_, static_cast<size_t>(request)) * output_.token_stride;
    for (size_t head = 0; head < group_; ++head) {
      const size_t query_head = first_query_head(request, kv_head) + head;
      float max = kNoMax;
      int32_t rows = 0;
      for (int part = 0; part < plan.num_parts(); ++part) {
        const Partial& partial = partials_[first + part * group_ + head];
        max = std::max(max, partial.softmax.max);
        rows += partial.rows;
      }
      std::fill(out, out + head_size_, 0.0f);
      float sum = 0.0f;
      for (int part = 0; part < plan.num_parts(); ++part) {
        const size_t index = first + part * group_ + head;
        const Partial& partial = partials_[index];
        if (partial.softmax.sum == 0.0f) continue;
        const float shrink = std::exp(partial.softmax.max - max);
        sum += shrink * partial.softmax.sum;
        const float* acc = &acc_[index * head_size_];
        for (size_t d = 0; d < head_size_; ++d) out[d] += shrink * acc[d];
      }
      const bool empty = sum == 0.0f;
      const float inverse = empty ? 0.0f : 1.0f / sum;
      for (size_t d = 0; d < head_size_; ++d) out[d] *= inverse;
      from_float(output_.out_type, out, head_size_,
                 token + (static_cast<size_t>(kv_head) * group_ + head) * head_size_ *
                             element_bytes(output_.out_type));
      if (output_.lse != nullptr)
        output_.lse[query_head] =
            empty ? -std::numeric_limits<float>::infinity() : max + std::log(sum);
      output_.sampled_rows[query_head] = plan.exact ? -1 : rows;
      if (has_error_bar(plan, kv_head))
        output_.error_bars[query_head] = error_bar(plan, first + head, {max, sum}, out);
    }
  }

  bool has_error_bar(const Plan& plan, int kv_head) const {
    const int position = plan.num_tokens - 1;
    return errors_ != nullptr && !plan.exact && (position + kv_head) % kErrorBarSteps == 0;
  }

  /// signature_reference.error_bar of a head, of partials `group_` apart from `first` on: with the
  /// sums over the list of ErrorSums, sum c |V - out|^2 is the square less 2 out.(sum c V) and more
  /// |out|^2 times the weight.
  float error_bar(const Plan& plan, size_t first, Softmax whole, const float* out) const {
    alignas(64) float values[kMaxHeadSize] = {};
    double weight = 0.0, square = 0.0;
    for (int part = plan.num_static_parts; part < plan.num_parts(); ++part) {
      const size_t index = first + static_cast<size_t>(part) * group_;
      const float shrink = std::exp(partials_[index].softmax.max - whole.max);
      const float of_part = shrink * shrink;
      weight += static_cast<double>(of_part * errors_[index].weight);
      square += static_cast<double>(of_part * errors_[index].square);
      const float* acc = &error_acc_[index * head_size_];
      for (size_t d = 0; d < head_size_; ++d) values[d] += of_part * acc[d];
    }
    double product = 0.0, norm = 0.0;
    for (size_t d = 0; d < head_size_; ++d) {
      product += static_cast<double>(values[d]) * static_cast<double>(out[d]);
      norm += static_cast<double>(out[d]) * static_cast<double>(out[d]);
    }
    const double spread = square - 2 * product + norm * weight;
    // What rounding leaves of equal values may be below 0, and is an error of 0 for any output.
    if (spread <= 0.0) return 0.0f;
    return static_cast<float>(std::sqrt(spread / norm) / static_cast<double>(whole.sum));
  }

  const Pages& pages_;
  const Requests& requests_;
  const DecodeInput& input_;
  DecodeOutput& output_;
  const Kernels& kernels_;
  Workspace& workspace_;
  const size_t group_;
  const size_t head_size_;
  const std::unique_ptr<Sampler> sampler_;  // null in exact mode
  std::vector<TokenRange> middles_;
  StepView view_;
  std::vector<Plan> plans_;
  std::vector<size_t> first_part_;
  std::vector<Task> tasks_;
  Partial* partials_;
  float* acc_;
  ErrorSums* errors_ = nullptr;  // as partials; null without signatures
  float* error_acc_ = nullptr;   // as acc
  std::unique_ptr<std::atomic<int>[]> parts_left_;
};

}  // namespace

void read_queries(const Pages& pages, const Requests& requests, const DecodeInput& input,
                  float* to) {
  const size_t heads = static_cast<size_t>(input.num_q_heads);
  const size_t head_size = static_cast<size_t>(pages.layout().head_size);
  for (size_t i = 0; i < static_cast<size_t>(requests.size) * heads; ++i)
    to_float(input.query_type,
             input.query.bytes + token_of(input, i / heads) * input.query.token_stride +
                 static_cast<ptrdiff_t>(i % heads) * input.query.head_stride,
             head_size, to + i * head_size);
}

void decode_attention(const Pages& pages, const Requests& requests, const DecodeInput& input,
                      DecodeOutput& output, Isa isa, ThreadPool& pool) {
  const ThreadPool::Use use(pool);
  // Per calling thread: steps of several threads may be under way at once.
  static thread_local Workspace workspace;
  workspace.start(pool.num_threads());
  Step(pages, requests, input, isa, output, workspace).run(pool);
}

}  // namespace magicpig
