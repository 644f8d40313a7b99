// One decode step: queries as floats and as codes, what each query head attends to, how that is
// split into tasks, and how their results are merged.
//
// A task is (request, kv head, part). Parts depend on the request alone and their results merge in
// one order, so that the output is the same for any number of threads, and any batch.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "elements.h"
#include "sample_lookup.h"
#include "timing.h"

namespace magicpig {
namespace {

/// Static rows gathered before they are attended to; a multiple of the kernel's tile.
constexpr int kRowBatch = 1024;

// Parts are small enough that one request of 8K fills the cores, and few enough that merging a long
// one stays about one percent of its work.
constexpr int kStaticPartRows = 1024;
constexpr int kMaxStaticParts = 64;
constexpr int kSampledPartTokens = 2048;
constexpr int kMaxSampledParts = 32;

int divide_up(int a, int b) { return (a + b - 1) / b; }

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
  TokenRange sampled_part(int part) const {
    const int begin = middle.begin + part * sampled_part_tokens;
    return {begin, std::min(begin + sampled_part_tokens, middle.end)};
  }
};

Plan make_plan(const Requests& requests, int request, const DecodeInput& input) {
  Plan plan;
  plan.blocks = requests.blocks(request);
  plan.num_tokens = requests.seq_lens[request];
  plan.exact = true;
  plan.middle = {plan.num_tokens, plan.num_tokens};
  if (input.sample != nullptr) {
    const TokenRange middle = middle_of(plan.num_tokens, *input.sample->rule);
    if (middle.size() >= input.exact_below) {
      plan.exact = false;
      plan.middle = middle;
    }
  }
  plan.static_part_rows =
      std::max(kStaticPartRows, divide_up(plan.num_static_rows(), kMaxStaticParts));
  plan.num_static_parts = divide_up(plan.num_static_rows(), plan.static_part_rows);
  plan.sampled_part_tokens =
      std::max(kSampledPartTokens, divide_up(plan.middle.size(), kMaxSampledParts));
  plan.num_sampled_parts = divide_up(plan.middle.size(), plan.sampled_part_tokens);
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
  std::vector<int> first_row;  // of each query head, and the end
  uint64_t attention_ns = 0;
};

struct Workspace {
  std::vector<Lookup::Scratch> lookup;
  std::vector<Scratch> attention;
  Arena arena;  // of the calling thread

  void start(int num_threads) {
    const size_t threads = static_cast<size_t>(num_threads);
    if (lookup.size() < threads) lookup.resize(threads);
    if (attention.size() < threads) attention.resize(threads);
    arena.reset();
    for (Lookup::Scratch& scratch : lookup) {
      scratch.arena.reset();
      scratch.lookup_ns = 0;
    }
    for (Scratch& scratch : attention) scratch.attention_ns = 0;
  }
};

class Step {
 public:
  Step(const Pages& pages, const Requests& requests, const DecodeInput& input, Isa isa,
       DecodeOutput& output, Workspace& workspace)
      : pages_(pages),
        requests_(requests),
        input_(input),
        output_(output),
        isa_(isa),
        kernels_(kernels_of(isa)),
        workspace_(workspace),
        group_(input.num_q_heads / pages.num_kv_heads()),
        head_size_(static_cast<size_t>(pages.layout().head_size)) {
    size_t num_parts = 0;
    for (int r = 0; r < requests.size; ++r) {
      plans_.push_back(make_plan(requests, r, input));
      first_part_.push_back(num_parts);
      num_parts += static_cast<size_t>(plans_.back().num_parts() * pages.num_kv_heads());
      for (int head = 0; head < pages.num_kv_heads(); ++head)
        for (int part = 0; part < plans_.back().num_parts(); ++part)
          tasks_.push_back({r, head, part});
    }
    read_queries();
    partials_ = workspace.arena.take<Partial>(num_parts * group_);
    acc_ = workspace.arena.take<float>(num_parts * group_ * head_size_);
    const size_t groups = static_cast<size_t>(requests.size * pages.num_kv_heads());
    parts_left_.reset(new std::atomic<int>[groups]);
    for (int r = 0; r < requests.size; ++r)
      for (int head = 0; head < pages.num_kv_heads(); ++head)
        parts_left_[group_index(r, head)].store(plans_[r].num_parts());
  }

  void run(ThreadPool& pool) {
    std::vector<ThreadPool::Phase> phases;
    if (input_.sample != nullptr) {
      plan_lookup();
      if (input_.hash != nullptr) phases.push_back(hashing());
      phases.push_back(lookup_->phase(pool.num_threads(), workspace_.lookup));
      if (input_.hash != nullptr) end_of_hashing(phases[1]);
    }
    phases.push_back({[this] {
                        if (input_.sample != nullptr) weigh();
                        return tasks_.size();
                      },
                      [this](size_t i, int thread) {
                        const Task& task = tasks_[i];
                        run_task(task, workspace_.attention[static_cast<size_t>(thread)]);
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
    for (const Lookup::Scratch& s : workspace_.lookup) output_.lookup_ns += s.lookup_ns;
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

  /// Where a request's query and output are.
  ptrdiff_t token_of(size_t request) const {
    return input_.tokens == nullptr ? static_cast<ptrdiff_t>(request) : input_.tokens[request];
  }

  void read_queries() {
    const size_t heads = static_cast<size_t>(input_.num_q_heads);
    queries_ = workspace_.arena.take<float>(plans_.size() * heads * head_size_);
    for (size_t i = 0; i < plans_.size() * heads; ++i)
      to_float(input_.query_type,
               input_.query.bytes + token_of(i / heads) * input_.query.token_stride +
                   static_cast<ptrdiff_t>(i % heads) * input_.query.head_stride,
               head_size_, queries_ + i * head_size_);
  }

  size_t num_vectors() const { return plans_.size() * static_cast<size_t>(input_.num_q_heads); }

  /// The lookup, and the room for the codes that hashing makes, where they are not given.
  void plan_lookup() {
    sample_ = *input_.sample;
    if (input_.hash != nullptr) {
      codes_ = workspace_.arena.take<uint16_t>(num_vectors() *
                                               static_cast<size_t>(input_.hash->num_tables()));
      sample_.query_codes = codes_;
    }
    std::vector<TokenRange> middles;
    for (const Plan& plan : plans_) middles.push_back(plan.middle);
    lookup_ =
        std::make_unique<Lookup>(pages_, requests_, middles, input_.num_q_heads, sample_, kernels_);
    output_.unsealed_stretches = lookup_->unsealed_stretches();
  }

  ThreadPool::Phase hashing() {
    return {[this] {
              hashing_since_ = Clock::now();
              return SimHash::num_tasks(num_vectors());
            },
            [this](size_t task, int) {
              input_.hash->hash_task(task, queries_, num_vectors(), nullptr,
                                     static_cast<size_t>(input_.num_q_heads), codes_, isa_);
            }};
  }
  void end_of_hashing(ThreadPool::Phase& next) {
    next.start = [this, start = std::move(next.start)] {
      output_.hash_ns = nanoseconds_since(hashing_since_);
      return start();
    };
  }

  /// How each query head's sample is weighted.
  void weigh() {
    const InclusionTable& table = *input_.sample->rule->table;
    weightings_.reserve(plans_.size() * static_cast<size_t>(input_.num_q_heads));
    for (size_t r = 0; r < plans_.size(); ++r)
      for (int head = 0; head < input_.num_q_heads; ++head) {
        const float* query = queries_ + weightings_.size() * head_size_;
        const float* center = input_.center + static_cast<size_t>(head) / group_ * head_size_;
        // Eight sums at once: one waits for each of its additions.
        constexpr size_t kSums = 8;  // divides every head size
        double norms[kSums] = {}, dots[kSums] = {};
        for (size_t d = 0; d < head_size_; d += kSums)
          for (size_t i = 0; i < kSums; ++i) {
            norms[i] += static_cast<double>(query[d + i]) * query[d + i];
            dots[i] += static_cast<double>(query[d + i]) * center[d + i];
          }
        const double norm = std::accumulate(norms, norms + kSums, 0.0);
        const double dot = std::accumulate(dots, dots + kSums, 0.0);
        const Threshold threshold = lookup_->view(static_cast<int>(r), head).threshold;
        Weighting weighting = weighting_of(table, threshold);
        weighting.center = center;
        weighting.query_norm = static_cast<float>(std::sqrt(norm));
        weighting.query_dot_center = static_cast<float>(dot);
        weightings_.push_back(weighting);
      }
  }

  void run_task(const Task& task, Scratch& scratch) {
    const Plan& plan = plans_[task.request];
    Partial* partials = &partials_[partial_index(task)];
    float* acc = &acc_[partial_index(task) * head_size_];
    std::fill(partials, partials + group_, Partial{{kNoMax, 0.0f}, 0});
    std::fill(acc, acc + group_ * head_size_, 0.0f);

    const Clock::time_point start = Clock::now();
    if (task.part < plan.num_static_parts) {
      attend_static(task, plan, partials, acc, scratch);
    } else {
      gather_rows(task, plan, plan.sampled_part(task.part - plan.num_static_parts), scratch);
      for (size_t head = 0; head < group_; ++head)
        attend_sampled(task, head, partials[head], acc + head * head_size_, scratch);
    }
    scratch.attention_ns += nanoseconds_since(start);
  }

  /// The whole group over a run of the static rows.
  void attend_static(const Task& task, const Plan& plan, Partial* partials, float* acc,
                     Scratch& scratch) {
    std::vector<Softmax> softmax(group_, Softmax{kNoMax, 0.0f});
    AttendArgs args = attend_args(task, 0);
    args.num_heads = static_cast<int>(group_);
    args.softmax = softmax.data();
    args.acc = acc;
    scratch.rows.resize(kRowBatch);
    args.rows = scratch.rows.data();
    const int begin = task.part * plan.static_part_rows;
    const int end = std::min(begin + plan.static_part_rows, plan.num_static_rows());
    for (int i = begin; i < end; i += kRowBatch) {
      args.num_rows = std::min(kRowBatch, end - i);
      for (int r = 0; r < args.num_rows; ++r)
        scratch.rows[r] = pages_.row(plan.blocks, task.kv_head, plan.static_row(i + r));
      kernels_.attend(args);
    }
    for (size_t head = 0; head < group_; ++head) partials[head].softmax = softmax[head];
  }

  /// The rows that the group's heads sampled in a part, head after head.
  void gather_rows(const Task& task, const Plan& plan, TokenRange part, Scratch& scratch) {
    scratch.first_row.assign(1, 0);
    size_t size = 0;
    for (size_t head = 0; head < group_; ++head) {
      const SampleView& view = lookup_->view(
          task.request, task.kv_head * static_cast<int>(group_) + static_cast<int>(head));
      const int32_t* const end = view.positions + view.size;
      const int32_t* const first = std::lower_bound(view.positions, end, part.begin);
      const int32_t* const last = std::lower_bound(first, end, part.end);
      const size_t before = size;
      size += static_cast<size_t>(last - first);
      if (scratch.rows.size() < size) scratch.rows.resize(size);
      const uint8_t** rows = scratch.rows.data() + before;
      for (const int32_t* token = first; token < last; ++token)
        *rows++ = pages_.row(plan.blocks, task.kv_head, *token);
      scratch.first_row.push_back(static_cast<int>(size));
    }
  }

  /// One query head over its rows of scratch.
  void attend_sampled(const Task& task, size_t head, Partial& partial, float* acc,
                      const Scratch& scratch) {
    AttendArgs args = attend_args(task, head);
    const int end = scratch.first_row[head + 1];
    args.rows = scratch.rows.data() + scratch.first_row[head];
    args.num_rows = end - scratch.first_row[head];
    args.num_rows_ahead = scratch.first_row.back() - end;
    args.num_rows_fetched = scratch.first_row[head];
    args.num_heads = 1;
    args.weighting = &weightings_[first_query_head(task.request, task.kv_head) + head];
    args.softmax = &partial.softmax;
    args.acc = acc;
    kernels_.attend(args);
    partial.rows = args.num_rows;
  }

  AttendArgs attend_args(const Task& task, size_t head) const {
    AttendArgs args = {};
    args.row_type = pages_.layout().row_type;
    args.head_size = pages_.layout().head_size;
    args.scale = input_.scale;
    args.queries = queries_ + (first_query_head(task.request, task.kv_head) + head) * head_size_;
    return args;
  }

  /// reference.merge over all parts, in their order.
  void merge(int request, int kv_head) {
    const Plan& plan = plans_[request];
    const size_t first = partial_index({request, kv_head, 0});
    alignas(64) float out[kMaxHeadSize];
    uint8_t* const token =
        output_.out + token_of(static_cast<size_t>(request)) * output_.token_stride;
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
    }
  }

  const Pages& pages_;
  const Requests& requests_;
  const DecodeInput& input_;
  DecodeOutput& output_;
  const Isa isa_;
  const Kernels& kernels_;
  Workspace& workspace_;
  const size_t group_;
  const size_t head_size_;
  std::vector<Plan> plans_;
  std::vector<size_t> first_part_;
  std::vector<Task> tasks_;
  float* queries_;  // [num_reqs][num_q_heads][head_size]
  SampleInput sample_;
  uint16_t* codes_ = nullptr;  // [num_reqs][num_q_heads][num_tables], where they are hashed here
  Clock::time_point hashing_since_;
  std::unique_ptr<Lookup> lookup_;
  std::vector<Weighting> weightings_;  // [num_reqs][num_q_heads]
  Partial* partials_;
  float* acc_;
  std::unique_ptr<std::atomic<int>[]> parts_left_;
};

}  // namespace

void decode_attention(const Pages& pages, const Requests& requests, const DecodeInput& input,
                      DecodeOutput& output, Isa isa, ThreadPool& pool) {
  const ThreadPool::Use use(pool);
  // Per calling thread: steps of several threads may be under way at once.
  static thread_local Workspace workspace;
  workspace.start(pool.num_threads());
  Step(pages, requests, input, isa, output, workspace).run(pool);
}

}  // namespace magicpig
