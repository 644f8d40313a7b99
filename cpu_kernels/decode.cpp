// One decode step: how the work is split into tasks, and how their results are merged.
//
// A task is (request, kv head, part). Parts depend on the request alone and their results merge in
// one order, so that the output is the same for any number of threads, and any batch.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "kernels.h"

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

struct TokenRange {
  int begin, end;
};

int divide_up(int a, int b) { return (a + b - 1) / b; }

/// reference.middle.
TokenRange middle_of(int num_tokens, const SampleRule& rule) {
  const int begin = std::min(rule.sink_tokens, num_tokens);
  return {begin, std::max(begin, num_tokens - rule.window_tokens)};
}

/// What one request needs: its static rows (sink and window, or everything where exact), then the
/// stretches of its middle.
struct Plan {
  const int32_t* blocks;
  int num_tokens;
  bool exact;
  TokenRange middle;  // empty where exact
  std::vector<LshIndex::Found> segments;

  int num_static_rows() const { return num_tokens - (middle.end - middle.begin); }
  int static_row(int i) const { return i < middle.begin ? i : i - middle.begin + middle.end; }

  int static_part_rows;
  int num_static_parts;
  int sampled_part_tokens = 0;  // a multiple of the largest level, so that no segment lies in two
  int first_sampled_part = 0;   // counted in sampled_part_tokens from token 0
  int num_sampled_parts = 0;

  int num_parts() const { return num_static_parts + num_sampled_parts; }
  TokenRange sampled_part(int part) const {
    const int begin = (first_sampled_part + part) * sampled_part_tokens;
    return {begin, std::min(begin + sampled_part_tokens, middle.end)};
  }
};

Plan make_plan(const Requests& requests, int request, const SampleRule* rule, int exact_below) {
  Plan plan;
  plan.blocks = requests.blocks(request);
  plan.num_tokens = requests.seq_lens[request];
  plan.exact = true;
  plan.middle = {plan.num_tokens, plan.num_tokens};
  if (rule != nullptr) {
    const TokenRange middle = middle_of(plan.num_tokens, *rule);
    if (middle.end - middle.begin >= exact_below) {
      plan.exact = false;
      plan.middle = middle;
    }
  }
  plan.static_part_rows =
      std::max(kStaticPartRows, divide_up(plan.num_static_rows(), kMaxStaticParts));
  plan.num_static_parts = divide_up(plan.num_static_rows(), plan.static_part_rows);
  if (plan.middle.begin < plan.middle.end) {
    const int stretch = rule->index->levels().back();
    const int tokens = std::max(kSampledPartTokens, divide_up(plan.num_tokens, kMaxSampledParts));
    plan.sampled_part_tokens = divide_up(tokens, stretch) * stretch;
    plan.first_sampled_part = plan.middle.begin / plan.sampled_part_tokens;
    plan.num_sampled_parts =
        divide_up(plan.middle.end, plan.sampled_part_tokens) - plan.first_sampled_part;
    plan.segments = rule->index->find(plan.blocks, plan.num_tokens);
  }
  return plan;
}

struct Task {
  int request;
  int kv_head;
  int part;
};

std::vector<Task> make_tasks(const std::vector<Plan>& plans, int num_kv_heads, bool with_static) {
  std::vector<Task> tasks;
  for (size_t r = 0; r < plans.size(); ++r)
    for (int head = 0; head < num_kv_heads; ++head)
      for (int part = with_static ? 0 : plans[r].num_static_parts; part < plans[r].num_parts();
           ++part)
        tasks.push_back({static_cast<int>(r), head, part});
  return tasks;
}

/// What one thread needs for a lookup.
struct Lookup {
  std::vector<uint8_t> counters;
  std::vector<uint32_t> words;
  size_t head_stride = 0;

  void reserve(int segment_tokens, int part_tokens, int group) {
    counters.resize(static_cast<size_t>(segment_tokens));
    head_stride = std::max(head_stride, static_cast<size_t>(part_tokens / kTileTokens));
    words.resize(head_stride * static_cast<size_t>(group));
  }
};

/// The tokens of a part that each query head of a group matches, as bits from part.begin on. A
/// sealed stretch is counted by bucket, any other by comparing the codes in the pages. Bits outside
/// the middle mean nothing.
void look_up(const Pages& pages, const Plan& plan, int kv_head, TokenRange part,
             const uint16_t* query_codes, int group, int min_matches, const Kernels& kernels,
             Lookup& lookup) {
  const int block_size = pages.layout().block_size;
  const int begin = std::max(part.begin, plan.middle.begin / kTileTokens * kTileTokens);
  const auto bits_at = [&](int token) {
    return MatchBits{lookup.words.data() + (token - part.begin) / kTileTokens, lookup.head_stride};
  };
  auto segment = plan.segments.begin();
  int token = begin;
  while (token < part.end) {
    while (segment != plan.segments.end() && segment->end() <= token) ++segment;
    if (segment != plan.segments.end() && segment->begin <= token) {
      kernels.match_segment(segment->segment->view(kv_head), query_codes, group, min_matches,
                            lookup.counters.data(), bits_at(segment->begin));
      token = segment->end();
      continue;
    }
    const int block_end = token / block_size * block_size + block_size;
    const int end = std::min(block_end, part.end);
    kernels.match_tiles(pages.tile(plan.blocks[token / block_size], kv_head, token % block_size),
                        divide_up(end - token, kTileTokens), pages.layout().num_tables, query_codes,
                        group, min_matches, bits_at(token));
    token = block_end;
  }
}

/// Calls body(token) for each match of one head in the part and the middle, ascending.
template <class Body>
void for_each_match(const Plan& plan, TokenRange part, const Lookup& lookup, int head,
                    const Body& body) {
  const int begin = std::max(part.begin, plan.middle.begin);
  const uint32_t* words = lookup.words.data() + static_cast<size_t>(head) * lookup.head_stride;
  for (int start = begin / kTileTokens * kTileTokens; start < part.end; start += kTileTokens) {
    uint32_t word = words[(start - part.begin) / kTileTokens];
    if (start < begin) word &= ~uint32_t{0} << (begin - start);
    if (part.end - start < kTileTokens) word &= (uint32_t{1} << (part.end - start)) - 1;
    for (; word != 0; word &= word - 1) body(start + __builtin_ctz(word));
  }
}

/// What a task leaves for the merge, per query head of its group.
struct Partial {
  Softmax softmax;
  int32_t rows;
};

class Step {
 public:
  Step(const Pages& pages, const Requests& requests, const DecodeInput& input, Isa isa,
       DecodeOutput& output)
      : pages_(pages),
        input_(input),
        output_(output),
        kernels_(kernels_of(isa)),
        group_(input.num_q_heads / pages.num_kv_heads()),
        head_size_(static_cast<size_t>(pages.layout().head_size)) {
    const SampleRule* rule = input.sampled ? &input.rule : nullptr;
    size_t num_parts = 0;
    for (int r = 0; r < requests.size; ++r) {
      plans_.push_back(make_plan(requests, r, rule, input.exact_below));
      first_part_.push_back(num_parts);
      num_parts += static_cast<size_t>(plans_.back().num_parts() * pages.num_kv_heads());
      if (!plans_.back().exact)
        output.unsealed_stretches +=
            rule->index->num_missing(plans_.back().segments, plans_.back().num_tokens);
    }
    tasks_ = make_tasks(plans_, pages.num_kv_heads(), true);
    partials_.reset(new Partial[num_parts * group_]);
    acc_.reset(new float[num_parts * group_ * head_size_]);
    const size_t groups = static_cast<size_t>(requests.size * pages.num_kv_heads());
    parts_left_.reset(new std::atomic<int>[groups]);
    for (int r = 0; r < requests.size; ++r)
      for (int head = 0; head < pages.num_kv_heads(); ++head)
        parts_left_[group_index(r, head)].store(plans_[r].num_parts());
  }

  void run(ThreadPool& pool) {
    std::vector<Scratch> scratch(static_cast<size_t>(pool.num_threads()));
    pool.run(tasks_.size(), [&](size_t i, int thread) {
      const Task& task = tasks_[i];
      run_task(task, scratch[static_cast<size_t>(thread)]);
      // The last part of a group to finish merges it; which thread that is changes nothing.
      const size_t index = group_index(task.request, task.kv_head);
      if (parts_left_[index].fetch_sub(1, std::memory_order_acq_rel) == 1)
        merge(task.request, task.kv_head);
    });
    for (size_t r = 0; r < plans_.size(); ++r)  // no token, no task
      if (plans_[r].num_parts() == 0)
        for (int head = 0; head < pages_.num_kv_heads(); ++head) merge(static_cast<int>(r), head);
    for (const Scratch& s : scratch) {
      output_.lookup_ns += s.lookup_ns;
      output_.attention_ns += s.attention_ns;
    }
  }

 private:
  using Clock = std::chrono::steady_clock;

  static uint64_t nanoseconds(Clock::duration time) {
    return static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(time).count());
  }

  struct alignas(128) Scratch {
    Lookup lookup;
    std::vector<const uint8_t*> rows;
    std::vector<int> first_row;  // of each query head, and the end
    uint64_t lookup_ns = 0;
    uint64_t attention_ns = 0;
  };

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

  void run_task(const Task& task, Scratch& scratch) {
    const Plan& plan = plans_[task.request];
    Partial* partials = &partials_[partial_index(task)];
    float* acc = &acc_[partial_index(task) * head_size_];
    std::fill(partials, partials + group_, Partial{{kNoMax, 0.0f}, 0});
    std::fill(acc, acc + group_ * head_size_, 0.0f);

    const Clock::time_point start = Clock::now();
    Clock::time_point found = start;
    if (task.part < plan.num_static_parts) {
      attend_static(task, plan, partials, acc, scratch);
    } else {
      const TokenRange part = plan.sampled_part(task.part - plan.num_static_parts);
      const SampleRule& rule = input_.rule;
      const int stretch = rule.index->levels().back();
      const size_t num_tables = static_cast<size_t>(pages_.layout().num_tables);
      scratch.lookup.reserve(stretch, plan.sampled_part_tokens, static_cast<int>(group_));
      look_up(pages_, plan, task.kv_head, part,
              rule.query_codes + first_query_head(task.request, task.kv_head) * num_tables,
              static_cast<int>(group_), rule.min_matches, kernels_, scratch.lookup);
      gather_rows(task, plan, part, scratch);
      found = Clock::now();
      for (size_t head = 0; head < group_; ++head)
        attend_sampled(task, head, partials[head], acc + head * head_size_, scratch);
    }
    const Clock::time_point end = Clock::now();
    scratch.lookup_ns += nanoseconds(found - start);
    scratch.attention_ns += nanoseconds(end - found);
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
    scratch.rows.clear();
    scratch.first_row.assign(1, 0);
    for (size_t head = 0; head < group_; ++head) {
      for_each_match(plan, part, scratch.lookup, static_cast<int>(head), [&](int token) {
        scratch.rows.push_back(pages_.row(plan.blocks, task.kv_head, token));
      });
      scratch.first_row.push_back(static_cast<int>(scratch.rows.size()));
    }
  }

  /// One query head over its rows of scratch.
  void attend_sampled(const Task& task, size_t head, Partial& partial, float* acc,
                      const Scratch& scratch) {
    AttendArgs args = attend_args(task, head);
    const float* center = input_.center + static_cast<size_t>(task.kv_head) * head_size_;
    double norm = 0.0, dot = 0.0;
    for (size_t d = 0; d < head_size_; ++d) {
      norm += static_cast<double>(args.queries[d]) * args.queries[d];
      dot += static_cast<double>(args.queries[d]) * center[d];
    }
    const Weighting weighting = {input_.table, center, static_cast<float>(std::sqrt(norm)),
                                 static_cast<float>(dot)};
    const int end = scratch.first_row[head + 1];
    args.rows = scratch.rows.data() + scratch.first_row[head];
    args.num_rows = end - scratch.first_row[head];
    args.num_rows_ahead = static_cast<int>(scratch.rows.size()) - end;
    args.num_heads = 1;
    args.weighting = &weighting;
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
    args.queries =
        input_.query + (first_query_head(task.request, task.kv_head) + head) * head_size_;
    return args;
  }

  /// reference.merge over all parts, in their order.
  void merge(int request, int kv_head) {
    const Plan& plan = plans_[request];
    const size_t first = partial_index({request, kv_head, 0});
    for (size_t head = 0; head < group_; ++head) {
      const size_t query_head = first_query_head(request, kv_head) + head;
      float max = kNoMax;
      int32_t rows = 0;
      for (int part = 0; part < plan.num_parts(); ++part) {
        const Partial& partial = partials_[first + part * group_ + head];
        max = std::max(max, partial.softmax.max);
        rows += partial.rows;
      }
      float* out = output_.out + query_head * head_size_;
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
      output_.lse[query_head] =
          empty ? -std::numeric_limits<float>::infinity() : max + std::log(sum);
      output_.sampled_rows[query_head] = plan.exact ? -1 : rows;
    }
  }

  const Pages& pages_;
  const DecodeInput& input_;
  DecodeOutput& output_;
  const Kernels& kernels_;
  const size_t group_;
  const size_t head_size_;
  std::vector<Plan> plans_;
  std::vector<size_t> first_part_;
  std::vector<Task> tasks_;
  std::unique_ptr<Partial[]> partials_;
  std::unique_ptr<float[]> acc_;
  std::unique_ptr<std::atomic<int>[]> parts_left_;
};

}  // namespace

int middle_tokens(int num_tokens, const SampleRule& rule) {
  const TokenRange middle = middle_of(num_tokens, rule);
  return middle.end - middle.begin;
}

std::vector<std::vector<std::vector<int32_t>>> sample(const Requests& requests, int num_q_heads,
                                                      const SampleRule& rule, Isa isa,
                                                      ThreadPool& pool) {
  const Pages& pages = rule.index->pages();
  const int group = num_q_heads / pages.num_kv_heads();
  const int stretch = rule.index->levels().back();
  std::vector<Plan> plans;
  for (int r = 0; r < requests.size; ++r) plans.push_back(make_plan(requests, r, &rule, 0));
  const std::vector<Task> tasks = make_tasks(plans, pages.num_kv_heads(), false);

  std::vector<std::vector<std::vector<int32_t>>> found(tasks.size());  // [task][head of group]
  std::vector<Lookup> lookups(static_cast<size_t>(pool.num_threads()));
  pool.run(tasks.size(), [&](size_t i, int thread) {
    const Task& task = tasks[i];
    const Plan& plan = plans[task.request];
    const TokenRange part = plan.sampled_part(task.part - plan.num_static_parts);
    const size_t query_head =
        static_cast<size_t>(task.request) * num_q_heads + task.kv_head * group;
    Lookup& lookup = lookups[static_cast<size_t>(thread)];
    lookup.reserve(stretch, plan.sampled_part_tokens, group);
    look_up(pages, plan, task.kv_head, part,
            rule.query_codes + query_head * static_cast<size_t>(pages.layout().num_tables), group,
            rule.min_matches, kernels_of(isa), lookup);
    found[i].resize(static_cast<size_t>(group));
    for (int head = 0; head < group; ++head)
      for_each_match(plan, part, lookup, head,
                     [&](int token) { found[i][static_cast<size_t>(head)].push_back(token); });
  });

  std::vector<std::vector<std::vector<int32_t>>> result(
      plans.size(), std::vector<std::vector<int32_t>>(static_cast<size_t>(num_q_heads)));
  for (size_t i = 0; i < tasks.size(); ++i) {
    for (int head = 0; head < group; ++head) {
      const std::vector<int32_t>& part = found[i][static_cast<size_t>(head)];
      std::vector<int32_t>& all = result[tasks[i].request][tasks[i].kv_head * group + head];
      all.insert(all.end(), part.begin(), part.end());
    }
  }
  return result;
}

void decode_attention(const Pages& pages, const Requests& requests, const DecodeInput& input,
                      DecodeOutput& output, Isa isa, ThreadPool& pool) {
  Step(pages, requests, input, isa, output).run(pool);
}

}  // namespace magicpig
