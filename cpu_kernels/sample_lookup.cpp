// From codes to samples: stretches are counted by bucket or by code, then each head picks.
#include "sample_lookup.h"

#include <algorithm>
#include <climits>
#include <cstring>

#include "divide_up.h"
#include "split_mix.h"
#include "timing.h"

namespace magicpig {
namespace {

/// Tokens compared by code in one task: some tens of microseconds.
constexpr int kTokensByCode = 4096;
/// A lookup in segments is cut by query heads until each thread has this many tasks.
constexpr size_t kTasksPerThread = 3;

int tile_floor(int token) { return token / kTileTokens * kTileTokens; }

}  // namespace

TokenRange middle_of(int num_tokens, const SampleRule& rule) {
  const int begin = std::min(rule.sink_tokens, num_tokens);
  return {begin, std::max(begin, num_tokens - rule.window_tokens)};
}

int SampleRule::row_limit(int middle_tokens) const {
  if (!(row_budget > 0)) return INT_MAX;
  return std::max(1, static_cast<int>(row_budget * middle_tokens));
}

uint64_t tie_phase(uint64_t seed, int num_tokens, int query_head, const uint16_t* codes,
                   int num_tables) {
  uint64_t state = split_mix(seed);
  state = split_mix(state ^ static_cast<uint64_t>(num_tokens));
  state = split_mix(state ^ static_cast<uint64_t>(query_head));
  for (int i = 0; i < num_tables; ++i) state = split_mix(state ^ codes[i]);
  return state;
}

Lookup::Lookup(const Pages& pages, const Requests& requests, const std::vector<TokenRange>& middles,
               int num_q_heads, const SampleInput& input, const Kernels& kernels)
    : pages_(pages),
      input_(input),
      kernels_(kernels),
      num_q_heads_(num_q_heads),
      group_(num_q_heads / pages.num_kv_heads()),
      min_matches_(static_cast<uint8_t>(input.rule->min_matches)) {
  if (input.index != nullptr) input.index->start_lookup();
  size_t num_found = 0;
  for (int r = 0; r < requests.size; ++r) {
    plans_.push_back(make_plan(requests.blocks(r), requests.seq_lens[r], middles[r]));
    plans_.back().first_found = num_found;
    num_found += plans_.back().stretches.size() * static_cast<size_t>(num_q_heads);
  }
  found_.resize(num_found);
  const size_t num_heads = plans_.size() * static_cast<size_t>(num_q_heads);
  views_.assign(num_heads, SampleView{nullptr, 0, {input.rule->min_matches, 1.0f}});
}

Lookup::Plan Lookup::make_plan(const int32_t* blocks, int num_tokens, TokenRange middle) {
  Plan plan = {blocks, num_tokens, middle, input_.rule->row_limit(middle.size()), {}, 0};
  if (middle.size() == 0) return plan;
  int token = tile_floor(middle.begin);
  if (input_.index != nullptr) {
    const std::vector<LshIndex::Found> segments = input_.index->find(blocks, num_tokens);
    unsealed_stretches_ += input_.index->num_missing(segments, num_tokens);
    for (const LshIndex::Found& found : segments) {
      if (found.end() <= middle.begin || found.begin >= middle.end) continue;
      if (token < found.begin) cut_by_code(plan, token, found.begin);
      plan.stretches.push_back({found.begin, found.end(), found.segment});
      token = found.end();
    }
  }
  cut_by_code(plan, token, middle.end);
  return plan;
}

void Lookup::cut_by_code(Plan& plan, int begin, int end) const {
  for (int token = begin; token < end; token += kTokensByCode)
    plan.stretches.push_back({token, std::min(token + kTokensByCode, end), nullptr});
}

void Lookup::make_tasks(int num_threads) {
  const int num_kv_heads = pages_.num_kv_heads();
  size_t num_stretches = 0;
  for (const Plan& plan : plans_) num_stretches += plan.stretches.size();
  const size_t wanted = static_cast<size_t>(num_threads) * kTasksPerThread;
  const size_t uncut = std::max<size_t>(1, num_stretches * static_cast<size_t>(num_kv_heads));
  const int cuts = num_threads == 1 ? 1 : static_cast<int>((wanted + uncut - 1) / uncut);
  const int heads_of_segment = std::max(1, divide_up(group_, cuts));

  tasks_left_.reset(new std::atomic<int>[plans_.size() * static_cast<size_t>(num_kv_heads)]);
  for (size_t r = 0; r < plans_.size(); ++r)
    for (int kv_head = 0; kv_head < num_kv_heads; ++kv_head) {
      int count = 0;
      for (size_t s = 0; s < plans_[r].stretches.size(); ++s) {
        // Codes are read once for the whole group, buckets by each head for itself.
        const int step = plans_[r].stretches[s].segment ? heads_of_segment : group_;
        for (int head = 0; head < group_; head += step, ++count)
          tasks_.push_back({static_cast<int>(r), kv_head, static_cast<int>(s), head,
                            std::min(step, group_ - head)});
      }
      tasks_left_[r * static_cast<size_t>(num_kv_heads) + kv_head].store(count);
    }
  // The longest first, so that none of them is the last to start.
  const auto tokens = [this](const Task& task) {
    const Stretch& stretch = plans_[task.request].stretches[task.stretch];
    return stretch.end - stretch.begin;
  };
  std::stable_sort(tasks_.begin(), tasks_.end(),
                   [&](const Task& a, const Task& b) { return tokens(a) > tokens(b); });
}

ThreadPool::Phase Lookup::phase(int num_threads, std::vector<Scratch>& scratch) {
  const size_t heads = static_cast<size_t>(pages_.num_kv_heads());
  return {[this, num_threads] {
            make_tasks(num_threads);
            return tasks_.size();
          },
          [this, heads, &scratch](size_t i, int thread) {
            Scratch& own = scratch[static_cast<size_t>(thread)];
            const Clock::time_point start = Clock::now();
            const Task& task = tasks_[i];
            run_task(task, own);
            // Who comes last at a (request, kv head) picks its samples.
            std::atomic<int>& left =
                tasks_left_[static_cast<size_t>(task.request) * heads + task.kv_head];
            if (left.fetch_sub(1, std::memory_order_acq_rel) == 1)
              for (int head = 0; head < group_; ++head)
                pick(task.request, task.kv_head * group_ + head, own);
            own.lookup_ns += nanoseconds_since(start);
          }};
}

// --------------------------------------------------------------------------------------- counting

Matches Lookup::matches_in(Scratch& scratch, int tokens, int num_heads) const {
  const size_t heads = static_cast<size_t>(num_heads);
  const size_t words = static_cast<size_t>(divide_up(tokens, kTileTokens));
  if (scratch.words.size() < words * heads) scratch.words.resize(words * heads);
  scratch.num_scores.assign(heads, 0);
  Matches matches = {scratch.words.data(), words, nullptr, 0, scratch.num_scores.data()};
  if (limited()) {
    matches.score_stride = words * kTileTokens;
    const size_t size = matches.score_stride * heads;
    if (scratch.scores.size() < size) scratch.scores.resize(size);
    matches.scores = scratch.scores.data();
  }
  return matches;
}

Matches Lookup::count(const Plan& plan, const Stretch& stretch, int kv_head, const uint16_t* codes,
                      int num_heads, Scratch& scratch) const {
  // A segment may hold more than the stretch; keep() leaves that out.
  const int tokens =
      stretch.segment ? stretch.segment->segment_tokens : stretch.end - stretch.begin;
  const Matches matches = matches_in(scratch, tokens, num_heads);
  if (stretch.segment) {
    if (scratch.counters.size() < static_cast<size_t>(tokens))
      scratch.counters.resize(static_cast<size_t>(tokens));
    kernels_.match_segment(stretch.segment->view(kv_head), codes, num_heads, min_matches_,
                           scratch.counters.data(), matches);
  } else {
    count_by_code(plan, kv_head, stretch.begin, stretch.end, codes, num_heads, matches);
  }
  return matches;
}

/// Block by block. begin is a tile's; what lies between end and the end of its tile means nothing.
void Lookup::count_by_code(const Plan& plan, int kv_head, int begin, int end, const uint16_t* codes,
                           int num_heads, Matches matches) const {
  const int block_size = pages_.layout().block_size;
  const int num_tables = pages_.layout().num_tables;
  for (int token = begin; token < end;) {
    const int block = token / block_size;
    const int block_end = std::min((block + 1) * block_size, end);
    const int num_tiles = divide_up(block_end - token, kTileTokens);
    const uint16_t* tiles = pages_.tile(plan.blocks[block], kv_head, token % block_size);
    kernels_.match_tiles(tiles, num_tiles, num_tables, codes, num_heads, min_matches_, matches);
    matches.words += num_tiles;
    token = block_end;
  }
}

void Lookup::run_task(const Task& task, Scratch& scratch) {
  const Plan& plan = plans_[task.request];
  const Stretch& stretch = plan.stretches[task.stretch];
  const int query_head = task.kv_head * group_ + task.first_head;
  const Matches matches = count(plan, stretch, task.kv_head, codes_of(task.request, query_head),
                                task.num_heads, scratch);
  for (int head = 0; head < task.num_heads; ++head)
    found_[found_index(plan, query_head + head, static_cast<size_t>(task.stretch))] =
        keep(plan, stretch, matches, head, scratch);
}

/// The matches of a head that lie in the middle, moved to the thread's arena.
Lookup::Found Lookup::keep(const Plan& plan, const Stretch& stretch, const Matches& matches,
                           int head, Scratch& scratch) const {
  uint32_t* words = matches.words + static_cast<size_t>(head) * matches.head_stride;
  const int begin = std::max(stretch.begin, plan.middle.begin);
  const int end = std::min(stretch.end, plan.middle.end);
  // Bits outside the middle: at most the first word's lowest and the last one's highest, and whole
  // words behind it.
  const int first_word = (begin - stretch.begin) / kTileTokens;
  const int end_word = divide_up(end - stretch.begin, kTileTokens);
  const int num_words = end_word - first_word;
  const uint32_t first_mask = ~uint32_t{0} << ((begin - stretch.begin) % kTileTokens);
  const uint32_t before = words[first_word] & ~first_mask;
  words[first_word] &= first_mask;
  words[end_word - 1] &= ~uint32_t{0} >> (end_word * kTileTokens - (end - stretch.begin));

  Found found = {nullptr, nullptr, 0};
  int32_t* positions = scratch.arena.take<int32_t>(static_cast<size_t>(num_words) * kTileTokens);
  found.size = kernels_.list_tokens(words + first_word, num_words,
                                    stretch.begin + first_word * kTileTokens, positions);
  scratch.arena.keep(positions, static_cast<size_t>(found.size));
  found.positions = positions;
  if (matches.scores == nullptr) return found;

  // Scores are there for bits outside the middle, too: those of whole words before it and of the
  // first word's masked bits come first.
  size_t skipped = 0;
  for (int w = 0; w < first_word; ++w) skipped += __builtin_popcount(words[w]);
  skipped += __builtin_popcount(before);
  uint8_t* scores = scratch.arena.take<uint8_t>(static_cast<size_t>(found.size));
  std::memcpy(scores, matches.scores + static_cast<size_t>(head) * matches.score_stride + skipped,
              static_cast<size_t>(found.size));
  found.scores = scores;
  return found;
}

// ---------------------------------------------------------------------------------------- picking

std::vector<Lookup::Found> Lookup::found_by(const Plan& plan, int query_head) const {
  const auto first = found_.begin() + static_cast<ptrdiff_t>(found_index(plan, query_head, 0));
  return {first, first + static_cast<ptrdiff_t>(plan.stretches.size())};
}

void Lookup::pick(int request, int query_head, Scratch& scratch) {
  const Plan& plan = plans_[request];
  const size_t index = static_cast<size_t>(request) * num_q_heads_ + query_head;
  const std::vector<Found> found = found_by(plan, query_head);
  int64_t total = 0;
  for (const Found& part : found) total += part.size;
  if (total <= plan.row_limit) {
    views_[index] = pick_all(found, scratch);
  } else {
    const uint64_t phase = tie_phase(input_.rule->seed, plan.num_tokens, query_head,
                                     codes_of(request, query_head), pages_.layout().num_tables);
    views_[index] = pick_best(found, plan.row_limit, phase, scratch);
  }
}

SampleView Lookup::pick_all(const std::vector<Found>& found, Scratch& scratch) const {
  const Threshold threshold = {input_.rule->min_matches, 1.0f};
  if (found.size() == 1) return {found[0].positions, found[0].size, threshold};
  int size = 0;
  for (const Found& part : found) size += part.size;
  int32_t* positions = scratch.arena.take<int32_t>(static_cast<size_t>(size));
  int32_t* next = positions;
  for (const Found& part : found) next = std::copy_n(part.positions, part.size, next);
  return {positions, size, threshold};
}

/// The `limit` best of more. Of those that match equally well in the end, every (1 / fraction)th is
/// taken, from a place that phase tells: each has the same chance, and their number is no chance.
/// Source: reference.pick_best.
SampleView Lookup::pick_best(const std::vector<Found>& found, int limit, uint64_t phase,
                             Scratch& scratch) const {
  int histogram[256] = {};
  for (const Found& part : found)
    for (int i = 0; i < part.size; ++i) ++histogram[part.scores[i]];
  int score = 255, better = 0;
  while (better + histogram[score] < limit) better += histogram[score--];
  const uint64_t ties = static_cast<uint64_t>(histogram[score]);
  const uint64_t taken = static_cast<uint64_t>(limit - better);
  const float fraction = static_cast<float>(static_cast<double>(taken) / static_cast<double>(ties));

  int32_t* positions = scratch.arena.take<int32_t>(static_cast<size_t>(limit));
  int32_t* next = positions;
  uint64_t at = phase % ties;  // steps by `taken`; a tie is taken where it passes `ties`
  for (const Found& part : found) {
    for (int i = 0; i < part.size; ++i) {
      if (part.scores[i] < score) continue;
      if (part.scores[i] == score) {
        at += taken;
        if (at < ties) continue;
        at -= ties;
      }
      *next++ = part.positions[i];
    }
  }
  return {positions, limit, {score, fraction}};
}

// ------------------------------------------------------------------------------------- for tests

std::vector<std::vector<HeadSample>> sample(const Pages& pages, const Requests& requests,
                                            int num_q_heads, const SampleInput& input, Isa isa,
                                            ThreadPool& pool) {
  std::vector<TokenRange> middles;
  for (int r = 0; r < requests.size; ++r)
    middles.push_back(middle_of(requests.seq_lens[r], *input.rule));
  Lookup lookup(pages, requests, middles, num_q_heads, input, kernels_of(isa));
  std::vector<Lookup::Scratch> scratch(static_cast<size_t>(pool.num_threads()));
  pool.run({lookup.phase(pool.num_threads(), scratch)});
  std::vector<std::vector<HeadSample>> samples(static_cast<size_t>(requests.size));
  for (int r = 0; r < requests.size; ++r)
    for (int head = 0; head < num_q_heads; ++head) {
      const SampleView& view = lookup.view(r, head);
      samples[r].push_back({{view.positions, view.positions + view.size}, view.threshold});
    }
  return samples;
}

}  // namespace magicpig
