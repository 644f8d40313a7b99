// The paper's sample: tokens that match a query's code in enough tables, found through buckets, and
// weighted by the chance of that.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "sample_lookup.h"
#include "sampler.h"
#include "timing.h"

namespace magicpig {
namespace {

/// Small enough that one request of 8K fills the cores.
constexpr int kPartTokens = 2048;

/// What one thread needs, kept from step to step.
struct alignas(128) RowScratch {
  std::vector<const uint8_t*> rows;
  std::vector<int> first_row;  // of each query head, and the end
};

struct BucketWorkspace {
  std::vector<Lookup::Scratch> lookup;
  std::vector<RowScratch> rows;

  void start(int num_threads) {
    const size_t threads = static_cast<size_t>(num_threads);
    if (lookup.size() < threads) lookup.resize(threads);
    if (rows.size() < threads) rows.resize(threads);
    for (Lookup::Scratch& scratch : lookup) {
      scratch.arena.reset();
      scratch.lookup_ns = 0;
    }
  }
};

class BucketSampler final : public Sampler {
 public:
  BucketSampler(const DecodeInput& input, Isa isa, BucketWorkspace& workspace)
      : input_(input), isa_(isa), kernels_(kernels_of(isa)), workspace_(workspace) {}

  TokenRange middle(int num_tokens) const override {
    return middle_of(num_tokens, *input_.sample->rule);
  }
  int part_tokens() const override { return kPartTokens; }

  std::vector<ThreadPool::Phase> plan(const StepView& step, Arena& arena,
                                      ThreadPool& pool) override {
    step_ = &step;
    workspace_.start(pool.num_threads());
    sample_ = *input_.sample;
    if (input_.hash != nullptr) {
      codes_ =
          arena.take<uint16_t>(step.num_queries() * static_cast<size_t>(input_.hash->num_tables()));
      sample_.query_codes = codes_;
    }
    lookup_ = std::make_unique<Lookup>(step.pages, step.requests, step.middles, step.num_q_heads,
                                       sample_, kernels_);
    std::vector<ThreadPool::Phase> phases;
    if (input_.hash != nullptr) phases.push_back(hashing());
    phases.push_back(lookup_->phase(pool.num_threads(), workspace_.lookup));
    if (input_.hash != nullptr) end_of_hashing(phases[1]);
    return phases;
  }

  /// How each query head's sample is weighted.
  void start_attention() override {
    const InclusionTable& table = *input_.sample->rule->table;
    const size_t head_size = static_cast<size_t>(step_->pages.layout().head_size);
    weightings_.reserve(step_->num_queries());
    for (int r = 0; r < step_->requests.size; ++r)
      for (int head = 0; head < step_->num_q_heads; ++head) {
        const float* query = step_->queries + weightings_.size() * head_size;
        const float* center =
            input_.center + static_cast<size_t>(head) / step_->group() * head_size;
        // Eight sums at once: one waits for each of its additions.
        constexpr size_t kSums = 8;  // divides every head size
        double norms[kSums] = {}, dots[kSums] = {};
        for (size_t d = 0; d < head_size; d += kSums)
          for (size_t i = 0; i < kSums; ++i) {
            norms[i] += static_cast<double>(query[d + i]) * query[d + i];
            dots[i] += static_cast<double>(query[d + i]) * center[d + i];
          }
        const double norm = std::accumulate(norms, norms + kSums, 0.0);
        const double dot = std::accumulate(dots, dots + kSums, 0.0);
        Weighting weighting = weighting_of(table, lookup_->view(r, head).threshold);
        weighting.center = center;
        weighting.query_norm = static_cast<float>(std::sqrt(norm));
        weighting.query_dot_center = static_cast<float>(dot);
        weightings_.push_back(weighting);
      }
  }

  void attend(const SampledPart& part, AttendArgs args, int32_t* rows, int thread) override {
    RowScratch& scratch = workspace_.rows[static_cast<size_t>(thread)];
    gather_rows(part, scratch);
    const size_t head_size = static_cast<size_t>(args.head_size);
    const size_t first = step_->first_query(part.request, part.kv_head);
    args.num_heads = 1;
    for (size_t head = 0; head < step_->group(); ++head) {
      const int end = scratch.first_row[head + 1];
      args.rows = scratch.rows.data() + scratch.first_row[head];
      args.num_rows = end - scratch.first_row[head];
      args.num_rows_ahead = scratch.first_row.back() - end;
      args.num_rows_fetched = scratch.first_row[head];
      args.weighting = &weightings_[first + head];
      kernels_.attend(args);
      rows[head] = args.num_rows;
      args.queries += head_size;
      args.acc += head_size;
      ++args.softmax;
    }
  }

  void report(DecodeOutput& output) const override {
    output.unsealed_stretches = lookup_->unsealed_stretches();
    output.hash_ns = hash_ns_;
    for (const Lookup::Scratch& s : workspace_.lookup) output.lookup_ns += s.lookup_ns;
  }

 private:
  ThreadPool::Phase hashing() {
    return {[this] {
              hashing_since_ = Clock::now();
              return SimHash::num_tasks(step_->num_queries());
            },
            [this](size_t task, int) {
              input_.hash->hash_task(task, step_->queries, step_->num_queries(), nullptr,
                                     static_cast<size_t>(step_->num_q_heads), codes_, isa_);
            }};
  }
  void end_of_hashing(ThreadPool::Phase& next) {
    next.start = [this, start = std::move(next.start)] {
      hash_ns_ = nanoseconds_since(hashing_since_);
      return start();
    };
  }

  /// The rows that the group's heads sampled in a part, head after head.
  void gather_rows(const SampledPart& part, RowScratch& scratch) {
    scratch.first_row.assign(1, 0);
    size_t size = 0;
    const int32_t* blocks = step_->requests.blocks(part.request);
    const int group = static_cast<int>(step_->group());
    for (int head = 0; head < group; ++head) {
      const SampleView& view = lookup_->view(part.request, part.kv_head * group + head);
      const int32_t* const end = view.positions + view.size;
      const int32_t* const first = std::lower_bound(view.positions, end, part.tokens.begin);
      const int32_t* const last = std::lower_bound(first, end, part.tokens.end);
      const size_t before = size;
      size += static_cast<size_t>(last - first);
      if (scratch.rows.size() < size) scratch.rows.resize(size);
      const uint8_t** rows = scratch.rows.data() + before;
      for (const int32_t* token = first; token < last; ++token)
        *rows++ = step_->pages.row(blocks, part.kv_head, *token);
      scratch.first_row.push_back(static_cast<int>(size));
    }
  }

  const DecodeInput& input_;
  const Isa isa_;
  const Kernels& kernels_;
  BucketWorkspace& workspace_;
  const StepView* step_ = nullptr;
  SampleInput sample_ = {};
  uint16_t* codes_ = nullptr;  // [num_reqs][num_q_heads][num_tables], where they are hashed here
  Clock::time_point hashing_since_;
  uint64_t hash_ns_ = 0;
  std::unique_ptr<Lookup> lookup_;
  std::vector<Weighting> weightings_;  // [num_reqs][num_q_heads]
};

}  // namespace

std::unique_ptr<Sampler> make_bucket_sampler(const DecodeInput& input, Isa isa) {
  // Per calling thread: steps of several threads may be under way at once.
  static thread_local BucketWorkspace workspace;
  return std::make_unique<BucketSampler>(input, isa, workspace);
}

}  // namespace magicpig
