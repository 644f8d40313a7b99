// The sample by signatures: one list of rows for a kv head's group of query heads, of chances that
// follow from predicted logits. The exact twin of vllm_magicpig/signature_draw.py.
//
// Of each (request, kv head): exact logits of what is always attended and the scores of some tiles
// give every head's shrinkage and normaliser (prepare); a scan gives each token the largest share
// that a head of the group predicts for it (in parts); who scans the last part finds the constant
// that meets the budget. Then parts list their rows and attend to them.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "divide_up.h"
#include "elements.h"
#include "sampler.h"
#include "timing.h"

namespace magicpig {
namespace {

/// Scanned and attended by one task. Parts of 2,048 tokens take a quarter more time in all.
constexpr int kPartTokens = 8192;

constexpr double kUnits = 128 * 1.4426950408889634;  // of a nat
constexpr float kLeastShrinkage = 0.3f;
constexpr double kFloorShare = 0.1;

constexpr int kLeastSampledTiles = 16;
constexpr int kSampledPart = 32;
/// What powers that are linear between powers of two exceed, on average.
constexpr double kLinearExcess = 1 / (2 * 0.6931471805599453 * 0.6931471805599453);

int16_t saturated(int x) { return static_cast<int16_t>(std::clamp(x, -32768, 32767)); }

/// 2^(units / 128), units at most 0.
float power(int units) {
  static const std::vector<float> table = [] {
    std::vector<float> powers;
    for (int k = 0; k < 128; ++k) powers.push_back(static_cast<float>(std::exp2(k / 128.0)));
    return powers;
  }();
  if (units < kLeastPower) return 0.0f;
  return std::ldexp(table[static_cast<size_t>(units & 127)], units >> 7);
}

/// 128 log2 x of a positive float.
int log2_units(float x) {
  static const std::vector<int> table = [] {
    std::vector<int> logs;
    for (int k = 0; k < 256; ++k)
      logs.push_back(static_cast<int>(std::nearbyint(128 * std::log2(1 + (k + 0.5) / 256))));
    return logs;
  }();
  const int bits = static_cast<int>(bits_of_float(x));
  return ((bits >> 23) - 127) * 128 + table[static_cast<size_t>(bits >> 15 & 255)];
}

/// One (request, kv head) of a step; arrays in the step's arena.
struct Group {
  int request;
  int kv_head;
  int num_tokens;
  TokenRange middle;
  int first_block;  // that the middle lies in
  int num_blocks;
  const uint8_t** blocks;  // signatures of these
  float* queries;          // [g][head_size], in units
  int8_t* entries;         // of the tables
  SignatureScale* scales;  // [num_blocks][g]
  int16_t* asked;          // [num_blocks][2][64]
  int log_scale;
  int floor;

  int first_token() const { return first_block * kSignatureBlock; }
  /// Bits of the places whose tokens lie in `range`, of a tile.
  uint64_t places(int tile, TokenRange range) const {
    const int first = first_token() + tile * kSignatureTile;
    if (first >= range.begin && first + kSignatureTile <= range.end) return ~uint64_t{0};
    uint64_t bits = 0;
    for (int t = 0; t < kSignatureTile; ++t)
      if (first + t >= range.begin && first + t < range.end)
        bits |= uint64_t{1} << signature_place(t);
    return bits;
  }
};

struct Part {
  int group;
  int first_block;  // of the group's
  int num_blocks;
};

/// Grows a buffer that is kept: what it holds beyond is left from other steps.
template <class T>
void at_least(std::vector<T>& buffer, size_t size) {
  if (buffer.size() < size) buffer.resize(size);
}

/// What one thread needs, kept from step to step; buffers hold at least what a step needs.
struct alignas(128) Scratch {
  std::vector<const uint8_t*> rows;
  std::vector<int32_t> products;        // of static keys
  std::vector<int32_t> means;           // likewise of the blocks' means
  std::vector<int> sampled;             // the sampled tiles, no more
  std::vector<int16_t> scores;          // of these
  std::vector<int16_t> powers;          // what a head adds up
  std::vector<float> units, shrinkage;  // of the tables
  std::vector<int> log_normaliser;
  std::vector<int32_t> listed;  // the first num_listed
  size_t num_listed = 0;
  std::vector<int16_t> log_chances;
  std::vector<float> costs;
  std::vector<SignatureScale> scales;  // of a sampled tile
  int num_inside = 0;                  // sampled tokens of the middle
  CountedChances counted;
  uint64_t scan_ns = 0;
};

struct Workspace {
  std::vector<Scratch> scratch;

  void start(int num_threads) {
    const size_t threads = static_cast<size_t>(num_threads);
    if (scratch.size() < threads) scratch.resize(threads);
    for (Scratch& s : scratch) s.scan_ns = 0;
  }
};

class SignatureSampler final : public Sampler {
 public:
  SignatureSampler(const DecodeInput& input, Isa isa, Workspace& workspace)
      : rule_(*input.signatures->rule),
        pool_(*input.signatures->pool),
        layout_(pool_.layout()),
        isa_(isa),
        kernels_(kernels_of(isa)),
        workspace_(workspace) {}

  TokenRange middle(int num_tokens) const override { return rule_.middle(num_tokens); }
  int part_tokens() const override { return kPartTokens; }

  std::vector<ThreadPool::Phase> plan(const StepView& step, Arena& arena,
                                      ThreadPool& pool) override {
    step_ = &step;
    workspace_.start(pool.num_threads());
    encode_missing(pool);
    for (int r = 0; r < step.requests.size; ++r)
      for (int head = 0; head < step.pages.num_kv_heads(); ++head) add_group(r, head, arena);
    for (size_t g = 0; g < groups_.size(); ++g) {
      const int blocks =
          std::max(kPartTokens, divide_up(groups_[g].num_blocks * kSignatureBlock, kMaxParts)) /
          kSignatureBlock;
      parts_left_.emplace_back(divide_up(groups_[g].num_blocks, blocks));
      for (int first = 0; first < groups_[g].num_blocks; first += blocks)
        parts_.push_back(
            {static_cast<int>(g), first, std::min(blocks, groups_[g].num_blocks - first)});
    }
    return {{[this] { return groups_.size(); },
             [this](size_t i, int thread) {
               const Timed timed(scratch(thread));
               prepare(groups_[i], scratch(thread));
             }},
            {[this] { return parts_.size(); },
             [this](size_t i, int thread) {
               const Timed timed(scratch(thread));
               const Part& part = parts_[i];
               Group& group = groups_[static_cast<size_t>(part.group)];
               scan(group, part);
               std::atomic<int>& left = parts_left_[static_cast<size_t>(part.group)].count;
               if (left.fetch_sub(1, std::memory_order_acq_rel) == 1)
                 set_scale(group, scratch(thread));
             }}};
  }

  void attend(const SampledPart& part, AttendArgs args, int32_t* rows, int thread) override {
    Scratch& s = scratch(thread);
    const Group& group = groups_[index_of(part.request, part.kv_head)];
    {
      const Timed timed(s);
      list(group, part.tokens, s);
    }
    const int32_t* blocks = step_->requests.blocks(part.request);
    const NoiseTable& noise = NoiseTable::instance();
    at_least(s.rows, s.num_listed);
    at_least(s.costs, s.num_listed + kMaxLanes);
    for (size_t i = 0; i < s.num_listed; ++i) {
      s.rows[i] = step_->pages.row(blocks, part.kv_head, s.listed[i]);
      s.costs[i] = noise.cost(s.log_chances[i]);
    }
    args.rows = s.rows.data();
    args.num_rows = static_cast<int>(s.num_listed);
    args.costs = s.costs.data();
    kernels_.attend(args);
    std::fill(rows, rows + args.num_heads, args.num_rows);
  }

  void report(DecodeOutput& output) const override {
    for (const Scratch& s : workspace_.scratch) output.lookup_ns += s.scan_ns;
  }

  /// The list of each group, after the phases of plan().
  std::vector<Listed> listed(int request, int kv_head) {
    const Group& group = groups_[index_of(request, kv_head)];
    Scratch& s = scratch(0);
    list(group, group.middle, s);
    std::vector<Listed> found;
    for (size_t i = 0; i < s.num_listed; ++i) found.push_back({s.listed[i], s.log_chances[i]});
    return found;
  }

 private:
  static constexpr int kMaxParts = 32;

  /// A counter that a vector can hold.
  struct Left {
    explicit Left(int n) : count(n) {}
    Left(Left&& other) noexcept : count(other.count.load()) {}
    std::atomic<int> count;
  };
  class Timed {
   public:
    explicit Timed(Scratch& s) : scratch_(s), start_(Clock::now()) {}
    ~Timed() { scratch_.scan_ns += nanoseconds_since(start_); }
    Timed(const Timed&) = delete;
    Timed& operator=(const Timed&) = delete;

   private:
    Scratch& scratch_;
    const Clock::time_point start_;
  };

  Scratch& scratch(int thread) { return workspace_.scratch[static_cast<size_t>(thread)]; }
  size_t index_of(int request, int kv_head) const {
    return static_cast<size_t>(first_group_[static_cast<size_t>(request)] + kv_head);
  }

  void encode_missing(ThreadPool& pool) {
    // Those that are attended exactly need none.
    std::vector<int32_t> lengths(step_->requests.seq_lens,
                                 step_->requests.seq_lens + step_->requests.size);
    for (size_t r = 0; r < lengths.size(); ++r)
      if (step_->middles[r].size() == 0) lengths[r] = 0;
    pool_.encode(
        {step_->requests.tables, step_->requests.stride, lengths.data(), step_->requests.size},
        isa_, pool);
  }

  void add_group(int request, int kv_head, Arena& arena) {
    if (kv_head == 0) first_group_.push_back(static_cast<int>(groups_.size()));
    const TokenRange middle = step_->middles[static_cast<size_t>(request)];
    if (middle.size() == 0) return;
    const size_t heads = step_->group();
    Group group = {};
    group.request = request;
    group.kv_head = kv_head;
    group.num_tokens = step_->requests.seq_lens[request];
    group.middle = middle;
    group.first_block = middle.begin / kSignatureBlock;
    group.num_blocks = divide_up(middle.end, kSignatureBlock) - group.first_block;
    const size_t blocks = static_cast<size_t>(group.num_blocks);
    group.blocks = arena.take<const uint8_t*>(blocks);
    group.queries = arena.take<float>(heads * static_cast<size_t>(layout_.head_size));
    group.entries = arena.take<int8_t>(static_cast<size_t>(layout_.size / 4) * heads * 16);
    group.scales = arena.take<SignatureScale>(blocks * heads);
    group.asked = arena.take<int16_t>(blocks * kSignatureBlock);
    groups_.push_back(group);
  }

  // --------------------------------------------------------------------------- before the scan

  void prepare(Group& group, Scratch& s) {
    const size_t heads = step_->group(), head_size = static_cast<size_t>(layout_.head_size);
    const int32_t* blocks = step_->requests.blocks(group.request);
    for (int b = 0; b < group.num_blocks; ++b)
      group.blocks[b] = pool_.signatures(blocks, group.kv_head, group.first_block + b);
    const float* queries = step_->queries_of(group.request, group.kv_head);
    const float units = static_cast<float>(static_cast<double>(step_->scale) * kUnits);
    for (size_t i = 0; i < heads * head_size; ++i) group.queries[i] = queries[i] * units;
    at_least(s.units, heads);
    kernels_.signature_tables(layout_, pool_.signs(), group.queries, static_cast<int>(heads),
                              group.entries, s.units.data());
    products_of_static_keys(group, s);
    products_of_means(group, s);
    choose_tiles(group, s);
    score_sampled_tiles(group, s);
    shrink(group, s);
    normalise(group, s);
    // The scan's scales, with scores shrunk and bases relative to the normaliser.
    for (size_t h = 0; h < heads; ++h) s.units[h] *= s.shrinkage[h];
    for (int b = 0; b < group.num_blocks; ++b)
      for (size_t h = 0; h < heads; ++h) {
        SignatureScale& scale = group.scales[static_cast<size_t>(b) * heads + h];
        set_multiplier(group.blocks[b], s.units[h], scale);
        scale.offset = saturated(base(group, s, b, h) - s.log_normaliser[h]);
      }
  }

  int num_static(const Group& group) const { return group.num_tokens - group.middle.size(); }

  void products_of_static_keys(const Group& group, Scratch& s) {
    const int size = num_static(group);
    const int32_t* blocks = step_->requests.blocks(group.request);
    at_least(s.rows, static_cast<size_t>(size));
    for (int i = 0; i < size; ++i) {
      const int token = i < group.middle.begin ? i : i + group.middle.size();
      s.rows[static_cast<size_t>(i)] = step_->pages.row(blocks, group.kv_head, token);
    }
    at_least(s.products, static_cast<size_t>(size) * step_->group());
    kernels_.row_products(step_->pages.layout().row_type, layout_.head_size, s.rows.data(), size,
                          group.queries, static_cast<int>(step_->group()), s.products.data());
  }

  void products_of_means(const Group& group, Scratch& s) {
    at_least(s.rows, static_cast<size_t>(group.num_blocks));
    for (int b = 0; b < group.num_blocks; ++b)
      s.rows[static_cast<size_t>(b)] = group.blocks[b] + layout_.header();
    at_least(s.means, static_cast<size_t>(group.num_blocks) * step_->group());
    kernels_.row_products(RowType::bfloat16, layout_.head_size, s.rows.data(), group.num_blocks,
                          group.queries, static_cast<int>(step_->group()), s.means.data());
  }
  int base(const Group& group, const Scratch& s, int block, size_t head) const {
    return s.means[head * static_cast<size_t>(group.num_blocks) + static_cast<size_t>(block)];
  }

  void set_multiplier(const uint8_t* block, float units, SignatureScale& scale) const {
    float factor_unit;
    std::memcpy(&factor_unit, block + layout_.header() + 2 * static_cast<size_t>(layout_.head_size),
                sizeof factor_unit);
    const float value = factor_unit * (units * std::ldexp(1.0f, 29 - layout_.sum_shift()));
    int exponent = 0;
    while (exponent < 7 && value > 32767.0f * static_cast<float>(1 << exponent)) ++exponent;
    const float scaled = std::nearbyint(value / static_cast<float>(1 << exponent));
    scale.multiplier = static_cast<int16_t>(scaled < 32767.0f ? scaled : 32767.0f);
    scale.exponent = static_cast<int16_t>(exponent);
  }

  int first_tile(const Group& group) const {
    return group.middle.begin / kSignatureTile - 2 * group.first_block;
  }
  int last_tile(const Group& group) const {  // the one behind it
    return divide_up(group.middle.end, kSignatureTile) - 2 * group.first_block;
  }

  /// s.sampled: tiles at equal distances, of those that the middle lies in.
  void choose_tiles(const Group& group, Scratch& s) const {
    const int all = last_tile(group) - first_tile(group);
    const int k = std::min(std::max(kLeastSampledTiles, all / kSampledPart), all);
    const uint64_t r = rule_.step_word(group.kv_head, group.num_tokens, 0) & 0xffffffffu;
    s.sampled.clear();
    for (int i = 0; i < k; ++i) {
      const uint64_t place = (static_cast<uint64_t>(i) << 32) + r;
      s.sampled.push_back(
          first_tile(group) +
          static_cast<int>(place * static_cast<uint64_t>(all) / static_cast<uint64_t>(k) >> 32));
    }
  }

  /// s.scores: [sampled tile][g][64], without offsets and unshrunk.
  void score_sampled_tiles(const Group& group, Scratch& s) {
    const size_t heads = step_->group();
    const int k = static_cast<int>(s.sampled.size());
    at_least(s.scores, s.sampled.size() * heads * kSignatureTile);
    std::vector<SignatureScale>& scales = s.scales;
    at_least(scales, heads);
    for (int i = 0; i < k; ++i) {
      const int tile = s.sampled[static_cast<size_t>(i)];
      const uint8_t* block = group.blocks[tile / 2];
      for (size_t h = 0; h < heads; ++h) set_multiplier(block, s.units[h], scales[h]);
      kernels_.signature_scores(layout_, group.entries, static_cast<int>(heads),
                                block + static_cast<size_t>(tile % 2) * layout_.tile_bytes(),
                                scales.data(),
                                &s.scores[static_cast<size_t>(i) * heads * kSignatureTile]);
    }
  }

  void shrink(const Group& group, Scratch& s) {
    const size_t heads = step_->group(), head_size = static_cast<size_t>(layout_.head_size);
    float error = 0.0f;
    for (int b = 0; b < group.num_blocks; ++b) {
      float of_block;
      std::memcpy(&of_block, group.blocks[b] + layout_.header() + 2 * head_size + sizeof(float),
                  sizeof of_block);
      error = b == 0 ? of_block : error + of_block;
    }
    error = error / static_cast<float>(group.num_blocks * kSignatureBlock);
    const int k = static_cast<int>(s.sampled.size());
    at_least(s.shrinkage, heads);
    clear_outside(group, s);
    for (size_t h = 0; h < heads; ++h) {
      const int64_t squares =
          kernels_.squares_of_scores(tile_scores(s, 0, h), heads * kSignatureTile, k);
      const float variance = static_cast<float>(squares) / static_cast<float>(s.num_inside);
      const float square = sum16_of_squares(group.queries + h * head_size);
      const float b = variance > 0.0f ? 1.0f - square * error / variance : 1.0f;
      s.shrinkage[h] = b >= kLeastShrinkage ? std::min(b, 1.0f) : kLeastShrinkage;
    }
  }

  /// Counts the sampled tokens of the middle; scores of others are 0 from here on.
  void clear_outside(const Group& group, Scratch& s) const {
    s.num_inside = 0;
    for (int i = 0; i < static_cast<int>(s.sampled.size()); ++i) {
      const uint64_t inside = group.places(s.sampled[static_cast<size_t>(i)], group.middle);
      s.num_inside += __builtin_popcountll(inside);
      for (uint64_t outside = ~inside; outside != 0; outside &= outside - 1)
        for (size_t h = 0; h < step_->group(); ++h)
          tile_scores(s, i, h)[__builtin_ctzll(outside)] = 0;
    }
  }

  int16_t* tile_scores(Scratch& s, int i, size_t head) const {
    return &s.scores[(static_cast<size_t>(i) * step_->group() + head) * kSignatureTile];
  }

  float sum16_of_squares(const float* q) const {
    float parts[16] = {};
    for (int d = 0; d < layout_.head_size; ++d) parts[d % 16] += q[d] * q[d];
    for (int half = 8; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    return parts[0];
  }

  /// log of the whole softmax's sum, of every head: static keys and the sampled tokens, which stand
  /// for all of the middle.
  void normalise(const Group& group, Scratch& s) {
    const int k = static_cast<int>(s.sampled.size()), size = num_static(group);
    const float stands_for = static_cast<float>(static_cast<double>(group.middle.size()) /
                                                static_cast<double>(s.num_inside));
    at_least(s.log_normaliser, step_->group());
    for (size_t h = 0; h < step_->group(); ++h) {
      const int32_t* products = s.products.data() + h * static_cast<size_t>(size);
      const int static_top = *std::max_element(products, products + size);
      int reference = static_top;
      for (int i = 0; i < k; ++i)
        reference = std::max(reference, base(group, s, s.sampled[static_cast<size_t>(i)] / 2, h));
      const int multiplier =
          std::min(static_cast<int>(std::nearbyint(s.shrinkage[h] * 32768.0f)), 32767);
      at_least(s.powers, static_cast<size_t>(k) * kSignatureTile);
      int top = -32768;
      for (int i = 0; i < k; ++i) {
        const int tile = s.sampled[static_cast<size_t>(i)];
        const int offset = saturated(base(group, s, tile / 2, h) - reference);
        int16_t* z = &s.powers[static_cast<size_t>(i) * kSignatureTile];
        int largest = kernels_.shrink_scores(tile_scores(s, i, h), multiplier, offset, z);
        uint64_t outside = ~group.places(tile, group.middle);
        if (outside != 0) {
          for (; outside != 0; outside &= outside - 1) z[__builtin_ctzll(outside)] = -32768;
          largest = *std::max_element(z, z + kSignatureTile);
        }
        top = std::max(top, largest);
      }
      const float sampled = kernels_.sum_of_powers(s.powers.data(), k * kSignatureTile, top);
      at_least(s.powers, static_cast<size_t>(size));
      for (int i = 0; i < size; ++i)
        s.powers[static_cast<size_t>(i)] = saturated(products[i] - static_top);
      const float exact = kernels_.sum_of_powers(s.powers.data(), size, 0);
      const int most = std::max(top, static_top - reference);
      const float both =
          sampled * power(top - most) * stands_for + exact * power(static_top - reference - most);
      s.log_normaliser[h] =
          reference + most + log2_units(both * static_cast<float>(1 / kLinearExcess));
    }
  }

  // ------------------------------------------------------------------------------ scan and choice

  void scan(const Group& group, const Part& part) const {
    const size_t first = static_cast<size_t>(part.first_block);
    SignatureScan args = {};
    args.layout = &layout_;
    args.entries = group.entries;
    args.num_heads = static_cast<int>(step_->group());
    args.blocks = group.blocks + first;
    args.num_blocks = part.num_blocks;
    args.scales = group.scales + first * step_->group();
    args.asked = group.asked + first * kSignatureBlock;
    kernels_.signature_scan(args);
  }

  void set_scale(Group& group, Scratch& s) const {
    const int m = group.middle.size();
    const int places = m < 4096 ? 64 : m < 16384 ? 32 : 16;
    const uint64_t counted = places == 64 ? ~uint64_t{0} : (uint64_t{1} << places) - 1;
    s.counted.start();
    for (int tile = first_tile(group); tile < last_tile(group); ++tile)
      s.counted.add(group.asked + tile * kSignatureTile,
                    group.places(tile, group.middle) & counted);
    const double rows = rule_.row_budget * m;
    group.floor = NoiseTable::instance().floor_of(kFloorShare * rows / m);
    group.log_scale = s.counted.solve(rows, m, group.floor);
  }

  /// Of the range, which lies in the middle, into s.listed and s.log_chances.
  void list(const Group& group, TokenRange range, Scratch& s) const {
    const int begin = range.begin / kSignatureTile, end = divide_up(range.end, kSignatureTile);
    at_least(s.listed, static_cast<size_t>(end - begin + 1) * kSignatureTile);
    at_least(s.log_chances, s.listed.size());
    s.num_listed = 0;
    for (int tile = begin; tile < end;) {
      // The noise runs on till the table's end, and starts elsewhere with every 65,536 tokens.
      constexpr int kTiles = kNoiseEntries / kSignatureTile;
      const uint64_t word = rule_.step_word(group.kv_head, group.num_tokens, 1 + tile / kTiles);
      const int at = static_cast<int>((word + static_cast<uint64_t>(tile) * kSignatureTile) &
                                      (kNoiseEntries - 1));
      const int run = std::min(
          {end - tile, kTiles - tile % kTiles, divide_up(kNoiseEntries - at, kSignatureTile)});
      SignatureChoice choice = {};
      choice.asked =
          group.asked + static_cast<ptrdiff_t>(tile - 2 * group.first_block) * kSignatureTile;
      choice.noise = NoiseTable::instance().entries() + at;
      choice.num_tiles = run;
      choice.first_token = tile * kSignatureTile;
      choice.tokens = range;
      choice.log_scale = group.log_scale;
      choice.floor = group.floor;
      choice.listed = s.listed.data() + s.num_listed;
      choice.log_chances = s.log_chances.data() + s.num_listed;
      s.num_listed += static_cast<size_t>(kernels_.signature_choose(choice));
      tile += run;
    }
  }

  const SignatureRule& rule_;
  SignaturePool& pool_;
  const SignatureLayout layout_;
  const Isa isa_;
  const Kernels& kernels_;
  Workspace& workspace_;
  const StepView* step_ = nullptr;
  std::vector<Group> groups_;
  std::vector<int> first_group_;  // of each request
  std::vector<Part> parts_;
  std::vector<Left> parts_left_;  // of each group
};

Workspace& workspace_of_thread() {
  // Per calling thread: steps of several threads may be under way at once.
  static thread_local Workspace workspace;
  return workspace;
}

}  // namespace

std::unique_ptr<Sampler> make_signature_sampler(const DecodeInput& input, Isa isa) {
  return std::make_unique<SignatureSampler>(input, isa, workspace_of_thread());
}

std::vector<std::vector<Listed>> signature_lists(const Pages& pages, const Requests& requests,
                                                 const DecodeInput& input, Isa isa,
                                                 ThreadPool& pool) {
  SignatureSampler sampler(input, isa, workspace_of_thread());
  std::vector<TokenRange> middles;
  for (int r = 0; r < requests.size; ++r) {
    const TokenRange middle = sampler.middle(requests.seq_lens[r]);
    middles.push_back(middle.size() >= input.exact_below ? middle : TokenRange{0, 0});
  }
  std::vector<float> queries(static_cast<size_t>(requests.size) *
                             static_cast<size_t>(input.num_q_heads) *
                             static_cast<size_t>(pages.layout().head_size));
  read_queries(pages, requests, input, queries.data());
  const StepView step = {pages, requests, middles, queries.data(), input.num_q_heads, input.scale};
  Arena arena;
  pool.run(sampler.plan(step, arena, pool));
  std::vector<std::vector<Listed>> lists;
  for (int r = 0; r < requests.size; ++r)
    for (int head = 0; head < pages.num_kv_heads(); ++head)
      lists.push_back(middles[static_cast<size_t>(r)].size() == 0 ? std::vector<Listed>{}
                                                                  : sampler.listed(r, head));
  return lists;
}

}  // namespace magicpig
