// Codes of vectors, and the buckets of sealed segments.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <tuple>
#include <unordered_set>

#include "give_way.h"
#include "kernels.h"
#include "segment_memory.h"

namespace magicpig {
namespace {

constexpr size_t kSmallPage = 4096;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

size_t storage_bytes(const Segment& shape, int num_kv_heads) {
  const size_t bytes = static_cast<size_t>(num_kv_heads) *
                       (shape.ids_size() + shape.offsets_size()) * sizeof(uint16_t);
  return bytes >= kHugePage ? round_up(bytes, kSmallPage) : bytes;
}

/// Copies the codes of a tile; table l goes to out + l * stride. A new owner may be writing the
/// tile meanwhile: a race by design, as LshIndex::build discards what it makes of such codes.
__attribute__((no_sanitize("thread"))) void copy_codes(const uint16_t* tile, int num_tables,
                                                       uint16_t* out, size_t stride) {
  for (int l = 0; l < num_tables; ++l)
    for (int i = 0; i < kTileTokens; ++i) out[l * stride + i] = tile[l * kTileTokens + i];
}

/// Tables that are sorted together: of a tile, adjacent in the page, 512 bytes. They also keep the
/// counting from waiting for itself where tokens in a row have one code.
constexpr int kTablesAtOnce = 8;

/// Tokens of a table that are sorted without a look at who goes first: some ten microseconds.
constexpr size_t kTokensAtOnce = 4096;

/// What one thread needs to sort kTablesAtOnce tables of a segment.
struct SortScratch {
  explicit SortScratch(const GiveWay& to_steps) : give_way(to_steps) {}

  GiveWay give_way;
  std::unique_ptr<uint16_t[]> codes;   // [kTablesAtOnce][tokens]
  std::unique_ptr<uint16_t[]> counts;  // [kTablesAtOnce][count_stride], then where each goes on

  void reserve(size_t tokens, size_t count_stride) {
    if (codes) return;
    codes.reset(new uint16_t[kTablesAtOnce * tokens]);
    counts.reset(new uint16_t[kTablesAtOnce * count_stride]);
  }
};

/// Counts to where each bucket starts, in counts and in offsets; everything modulo 65,536.
void add_up(uint16_t* counts, size_t num_buckets, bool may_wrap, uint16_t* offsets) {
  size_t bucket = 0;
  uint64_t begin = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  // Four at a time in one word. No sum reaches 65,536 and carries into the next lane, unless the
  // segment has that many tokens.
  constexpr uint64_t kOnes = 0x0001000100010001;
  for (; !may_wrap && bucket + 4 <= num_buckets; bucket += 4) {
    uint64_t sizes;
    std::memcpy(&sizes, counts + bucket, sizeof sizes);
    const uint64_t ends = sizes * kOnes;
    const uint64_t begins = ends - sizes + begin * kOnes;
    begin += ends >> 48;
    std::memcpy(counts + bucket, &begins, sizeof begins);
    std::memcpy(offsets + bucket, &begins, sizeof begins);
  }
#endif
  for (; bucket <= num_buckets; ++bucket) {
    const uint16_t size = counts[bucket];
    counts[bucket] = offsets[bucket] = static_cast<uint16_t>(begin);
    begin += size;
  }
}

/// Sorts `tables` tables from first_table on, of which ids and offsets are the first one's. A code
/// of 2^K or more is no bucket's: it sorts behind them all, where no query finds it, as none equals
/// it in a comparison of codes.
///
/// Counts, and the places that they add up to, are kept modulo 65,536. Only of a bucket that holds
/// all 65,536 tokens does that change the count, to 0, and every place is 0 then, as it should be.
void sort_tables(const Pages& pages, const Segment& segment, int kv_head, int first_table,
                 int tables, uint16_t* ids, uint16_t* offsets, SortScratch& scratch) {
  constexpr size_t kTilesAhead = 2;
  const size_t block_size = static_cast<size_t>(pages.layout().block_size);
  const size_t tokens = static_cast<size_t>(segment.segment_tokens);
  const size_t num_buckets = static_cast<size_t>(segment.num_buckets);
  const uint16_t no_bucket = static_cast<uint16_t>(num_buckets);
  const size_t stride = num_buckets + 2;  // of counts, as of offsets
  scratch.reserve(tokens, stride);
  uint16_t* const codes = scratch.codes.get();
  uint16_t* const counts = scratch.counts.get();
  const auto strip = [&](size_t token) -> const uint16_t* {
    return pages.tile(segment.sources[token / block_size].block, kv_head,
                      static_cast<int>(token % block_size)) +
           first_table * kTileTokens;
  };

  std::fill_n(counts, stride * static_cast<size_t>(tables), uint16_t{0});
  for (size_t token = 0; token < tokens; token += kTileTokens) {
    if (token * static_cast<size_t>(tables) % kTokensAtOnce == 0) scratch.give_way();
    if (token + kTilesAhead * kTileTokens < tokens) {
      const uint16_t* ahead = strip(token + kTilesAhead * kTileTokens);
      for (int l = 0; l < tables; ++l) __builtin_prefetch(ahead + l * kTileTokens);
    }
    copy_codes(strip(token), tables, codes + token, tokens);
    // From here on the copy is what counts, not a second look at the page: a code beyond the
    // buckets would be written out of bounds.
    std::atomic_signal_fence(std::memory_order_seq_cst);
    for (int l = 0; l < tables; ++l) {
      uint16_t* code = codes + static_cast<size_t>(l) * tokens + token;
      for (int i = 0; i < kTileTokens; ++i) code[i] = std::min(code[i], no_bucket);
    }
    if (tables == kTablesAtOnce) {
      for (int i = 0; i < kTileTokens; ++i)
        for (size_t l = 0; l < kTablesAtOnce; ++l)
          ++counts[l * stride + codes[l * tokens + token + static_cast<size_t>(i)]];
    } else {
      for (size_t l = 0; l < static_cast<size_t>(tables); ++l)
        for (int i = 0; i < kTileTokens; ++i)
          ++counts[l * stride + codes[l * tokens + token + static_cast<size_t>(i)]];
    }
  }

  for (int l = 0; l < tables; ++l) {
    const uint16_t* code = codes + static_cast<size_t>(l) * tokens;
    uint16_t* next = counts + static_cast<size_t>(l) * stride;
    const bool may_wrap = tokens == kMaxSegmentTokens;
    const bool one_bucket = may_wrap && next[code[0]] == 0;
    add_up(next, num_buckets, may_wrap, offsets);
    offsets[num_buckets + 1] = one_bucket ? code[0] : Segment::kNoBucket;
    for (size_t begin = 0; begin < tokens; begin += kTokensAtOnce) {
      scratch.give_way();
      const size_t end = std::min(begin + kTokensAtOnce, tokens);
      for (size_t i = begin; i < end; ++i) ids[next[code[i]]++] = static_cast<uint16_t>(i);
    }
    ids += tokens;
    offsets += stride;
  }
}

}  // namespace

void Segment::Free::operator()(uint16_t* memory) const {
  if (own_bytes > 0) {
    give_back_segment_memory(memory, own_bytes);
  } else {
    std::free(memory);
  }
}

size_t LshIndex::level_of(const Stretch& stretch) const {
  const int tokens = static_cast<int>(stretch.size()) * pages_.layout().block_size;
  return static_cast<size_t>(std::find(levels_.begin(), levels_.end(), tokens) - levels_.begin());
}

bool LshIndex::current(const Stretch& stretch) const {
  return std::all_of(stretch.begin(), stretch.end(), [&](const Segment::Source& source) {
    return pages_.epoch(source.block) == source.epoch;
  });
}

int LshIndex::shared_tokens(const Segment& segment, const int32_t* blocks, int num_tokens) const {
  const int block_size = pages_.layout().block_size;
  const size_t num_blocks =
      std::min(segment.sources.size(), static_cast<size_t>(num_tokens / block_size));
  size_t i = 0;
  while (i < num_blocks && segment.sources[i].block == blocks[i] &&
         pages_.epoch(blocks[i]) == segment.sources[i].epoch)
    ++i;
  return static_cast<int>(i) * block_size / levels_[0] * levels_[0];
}

std::vector<LshIndex::Found> LshIndex::find(const int32_t* blocks, int num_tokens) const {
  const uint64_t now = lookups_.load(std::memory_order_relaxed);
  const int block_size = pages_.layout().block_size;
  std::vector<Found> found;
  std::lock_guard<std::mutex> lock(mutex_);
  for (int begin = 0; num_tokens - begin >= levels_[0];) {
    const int32_t* from = blocks + begin / block_size;
    Found best = {nullptr, begin, 0};
    const auto place = by_first_block_.find(*from);
    if (place != by_first_block_.end())
      for (const SegmentPtr& segment : place->second) {
        if (begin % segment->segment_tokens != 0) continue;
        const int tokens = shared_tokens(*segment, from, num_tokens - begin);
        if (2 * tokens < segment->segment_tokens)
          continue;  // most of what it reads would be in vain
        // Of equals the smaller segment: it is read in whole.
        if (tokens > best.tokens || (tokens == best.tokens && tokens > 0 &&
                                     segment->segment_tokens < best.segment->segment_tokens))
          best = {segment, begin, tokens};
      }
    if (best.tokens > 0) {
      best.segment->last_used.store(now, std::memory_order_relaxed);
      found.push_back(best);
    }
    begin += std::max(best.tokens, levels_[0]);
  }
  return found;
}

namespace {

/// Whether a segment that holds so many tokens of a stretch stands for it.
bool nearly(int held, int wanted) { return held >= wanted - wanted / 8; }

/// Calls body(level, begin, sealed) for each stretch of the best cover, in their order. A segment
/// that holds nearly all of a stretch, or more than it, stands for it: where requests part within a
/// large one, each builds the small rest for itself. Where its level is refused and it has no
/// segment, smaller ones take its place: half a stretch has room, or other requests share it, where
/// the whole has neither.
template <class Body>
void for_each_stretch(const std::vector<int>& levels, uint32_t refused,
                      const std::vector<LshIndex::Found>& found, int num_tokens, const Body& body) {
  size_t i = 0;
  for (int begin = 0; num_tokens - begin >= levels[0];) {
    while (i < found.size() && found[i].begin < begin) ++i;
    const int held = i < found.size() && found[i].begin == begin ? found[i].tokens : 0;
    size_t level = levels.size() - 1;
    while (levels[level] > num_tokens - begin || begin % levels[level] != 0) --level;
    while (level > 0 && !nearly(held, levels[level]) && (refused >> level & 1)) --level;
    const bool sealed = nearly(held, levels[level]);
    body(level, begin, sealed);
    begin += sealed ? held : levels[level];
  }
}

}  // namespace

size_t LshIndex::num_missing(const std::vector<Found>& found, int num_tokens) const {
  size_t missing = 0;
  for_each_stretch(levels_, refused_levels(), found, num_tokens,
                   [&](size_t, int, bool sealed) { missing += !sealed; });
  return missing;
}

std::vector<LshIndex::Stretch> LshIndex::missing(const Requests& requests) const {
  std::vector<std::vector<Found>> found;
  size_t num_missing_of_all = 0;
  for (int r = 0; r < requests.size; ++r) {
    found.push_back(find(requests.blocks(r), requests.seq_lens[r]));
    num_missing_of_all += num_missing(found.back(), requests.seq_lens[r]);
  }
  std::vector<Stretch> stretches;
  if (num_missing_of_all == 0) return stretches;

  const uint32_t refused = refused_levels();
  const int block_size = pages_.layout().block_size;
  // Two requests can end a stretch in one block and differ before it. The first of the batch has
  // it; replacing it for each in turn would build both anew in every call.
  std::unordered_set<uint64_t> claimed;
  for (int r = 0; r < requests.size; ++r) {
    for_each_stretch(levels_, refused, found[static_cast<size_t>(r)], requests.seq_lens[r],
                     [&](size_t level, int begin, bool sealed) {
                       const int32_t* first = requests.blocks(r) + begin / block_size;
                       const int32_t* end = first + levels_[level] / block_size;
                       const uint64_t key = uint64_t{level} << 32 | static_cast<uint32_t>(end[-1]);
                       if (!claimed.insert(key).second || sealed || refused >> level & 1) return;
                       Stretch& stretch = stretches.emplace_back();
                       stretch.reserve(static_cast<size_t>(end - first));
                       for (; first < end; ++first)
                         stretch.push_back({*first, pages_.epoch(*first)});
                     });
  }
  return stretches;
}

/// How much of a stretch has segments: of the first one, and of all.
LshIndex::Held LshIndex::held(const Stretch& stretch) const {
  std::vector<int32_t> blocks;
  for (const Segment::Source& source : stretch) blocks.push_back(source.block);
  const int num_tokens = static_cast<int>(blocks.size()) * pages_.layout().block_size;
  Held held = {0, 0, num_tokens};
  for (const Found& found : find(blocks.data(), num_tokens)) {
    if (found.begin == 0) held.first = found.tokens;
    held.all += found.tokens;
  }
  return held;
}

size_t LshIndex::build(const std::vector<Stretch>& stretches, ThreadPool& pool,
                       const ThreadPool* gives_way_to) {
  std::lock_guard<std::mutex> one_at_a_time(build_mutex_);
  drop_stale();
  size_t kept = 0;
  for (const Stretch& stretch : stretches) kept += build_one(stretch, pool, gives_way_to);
  return kept;
}

bool LshIndex::build_one(const Stretch& stretch, ThreadPool& pool, const ThreadPool* gives_way_to) {
  if (!current(stretch)) return false;
  const Held before = held(stretch);
  if (nearly(before.first, before.wanted)) return false;  // another one's, built meanwhile
  const std::shared_ptr<Segment> segment = allocate(stretch);
  if (!segment) return false;
  // What nothing serves is compared by code, which takes the steps longer than a builder beside
  // them.
  const bool can_wait = 2 * before.all >= before.wanted;
  sort_codes(*segment, pool, GiveWay(gives_way_to, can_wait));

  // A seqlock's end: codes that were read too late come from writes whose epochs are seen here.
  std::atomic_thread_fence(std::memory_order_acquire);
  const size_t level = level_of(stretch);
  std::vector<SegmentPtr> dropped;  // freed after the lock is
  std::lock_guard<std::mutex> lock(mutex_);
  if (!current(stretch)) return false;
  const auto drop = [&](size_t at, const Segment::Source* first, const Segment::Source* end) {
    const auto place = by_last_block_[at].find(end[-1].block);
    if (place == by_last_block_[at].end()) return;
    const Stretch& sources = place->second->sources;
    // Of another level: only what the new one covers. Of its own: it takes the place.
    if (at == level || std::equal(sources.begin(), sources.end(), first, end))
      dropped.push_back(take_out(by_last_block_[at], place));
  };
  for (size_t at = 0; at <= level; ++at) {
    const size_t blocks = static_cast<size_t>(levels_[at] / pages_.layout().block_size);
    for (size_t end = blocks; end <= stretch.size(); end += blocks)
      drop(at, stretch.data() + end - blocks, stretch.data() + end);
  }
  by_last_block_[level].emplace(stretch.back().block, segment);
  by_first_block_[stretch.front().block].push_back(segment);
  num_bytes_ += segment->num_bytes();
  ++segments_built_;
  changes_.fetch_add(1, std::memory_order_relaxed);
  return true;
}

/// Called with the lock held; the caller frees the segment without it.
LshIndex::SegmentPtr LshIndex::take_out(SegmentMap& map, SegmentMap::iterator place) {
  SegmentPtr segment = std::move(place->second);
  map.erase(place);
  const auto first = by_first_block_.find(segment->sources.front().block);
  first->second.erase(std::find(first->second.begin(), first->second.end(), segment));
  if (first->second.empty()) by_first_block_.erase(first);
  num_bytes_ -= segment->num_bytes();
  ++segments_dropped_;
  changes_.fetch_add(1, std::memory_order_relaxed);
  refused_levels_.store(0, std::memory_order_relaxed);
  return segment;
}

void LshIndex::drop_stale() {
  const uint64_t now = pages_.epochs_started();
  if (swept_at_.exchange(now, std::memory_order_relaxed) == now) return;
  // Lookups wait for neither the checks nor the freeing. Only builds and clear() take segments out,
  // and those wait for this one.
  std::vector<std::pair<size_t, SegmentPtr>> segments;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t level = 0; level < levels_.size(); ++level)
      for (const auto& entry : by_last_block_[level]) segments.emplace_back(level, entry.second);
  }
  std::vector<SegmentPtr> dropped;
  for (const auto& [level, segment] : segments) {
    if (current(segment->sources)) continue;
    std::lock_guard<std::mutex> lock(mutex_);
    SegmentMap& map = by_last_block_[level];
    dropped.push_back(take_out(map, map.find(segment->sources.back().block)));
  }
}

uint32_t LshIndex::refused_levels() const {
  const uint64_t since =
      lookups_.load(std::memory_order_relaxed) - refused_at_.load(std::memory_order_relaxed);
  return since < kRefusedLookups ? refused_levels_.load(std::memory_order_relaxed) : 0;
}

/// Whether so much fits into max_bytes; segments that no request used of late are dropped for it,
/// those that were not used for longest first, unless all of them would not do.
bool LshIndex::make_room(size_t num_bytes) {
  std::vector<SegmentPtr> dropped;  // freed after the lock is
  std::lock_guard<std::mutex> lock(mutex_);
  if (num_bytes_ + num_bytes <= max_bytes_) return true;
  struct Idle {
    uint64_t last_used;
    size_t level;
    int32_t last_block;
    size_t num_bytes;
  };
  std::vector<Idle> idle;
  size_t idle_bytes = 0;
  const uint64_t now = lookups_.load(std::memory_order_relaxed);
  for (size_t level = 0; level < levels_.size(); ++level)
    for (const auto& [last_block, segment] : by_last_block_[level]) {
      const uint64_t last_used = segment->last_used.load(std::memory_order_relaxed);
      if (last_used + kIdleLookups > now) continue;
      idle.push_back({last_used, level, last_block, segment->num_bytes()});
      idle_bytes += segment->num_bytes();
    }
  if (num_bytes_ - idle_bytes + num_bytes > max_bytes_) return false;
  std::sort(idle.begin(), idle.end(), [](const Idle& a, const Idle& b) {
    return std::tie(a.last_used, a.level, a.last_block) <
           std::tie(b.last_used, b.level, b.last_block);
  });
  for (const Idle& one : idle) {
    if (num_bytes_ + num_bytes <= max_bytes_) break;
    SegmentMap& map = by_last_block_[one.level];
    dropped.push_back(take_out(map, map.find(one.last_block)));
  }
  return true;
}

/// Null where max_bytes does not allow it.
std::shared_ptr<Segment> LshIndex::allocate(const Stretch& stretch) {
  auto segment = std::make_shared<Segment>();
  segment->sources = stretch;
  segment->segment_tokens = levels_[level_of(stretch)];
  segment->num_buckets = 1 << num_bits_;
  segment->num_tables = pages_.layout().num_tables;
  segment->storage_bytes = storage_bytes(*segment, pages_.num_kv_heads());
  segment->last_used.store(lookups_.load(std::memory_order_relaxed), std::memory_order_relaxed);
  if (max_bytes_ > 0 && !make_room(segment->num_bytes())) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++builds_refused_;
    refused_levels_.fetch_or(uint32_t{1} << level_of(stretch), std::memory_order_relaxed);
    refused_at_.store(lookups_.load(std::memory_order_relaxed), std::memory_order_relaxed);
    return nullptr;
  }
  if (segment->storage_bytes >= kHugePage) {
    segment->storage = {take_segment_memory(segment->storage_bytes),
                        Segment::Free{segment->storage_bytes}};
  } else {
    void* memory = std::malloc(segment->storage_bytes);
    if (memory == nullptr) throw std::bad_alloc();
    segment->storage.reset(static_cast<uint16_t*>(memory));
  }
  return segment;
}

void LshIndex::sort_codes(Segment& segment, ThreadPool& pool, const GiveWay& to_steps) const {
  const size_t tokens = static_cast<size_t>(segment.segment_tokens);
  const size_t num_buckets = static_cast<size_t>(segment.num_buckets);
  const int groups = (segment.num_tables + kTablesAtOnce - 1) / kTablesAtOnce;
  std::vector<SortScratch> scratch;
  for (int thread = 0; thread < pool.num_threads(); ++thread) scratch.emplace_back(to_steps);
  pool.run(static_cast<size_t>(groups * pages_.num_kv_heads()), [&](size_t task, int thread) {
    const int kv_head = static_cast<int>(task) / groups;
    const int first_table = static_cast<int>(task) % groups * kTablesAtOnce;
    const size_t first = static_cast<size_t>(first_table);
    uint16_t* ids = segment.storage.get() +
                    static_cast<size_t>(kv_head) * (segment.ids_size() + segment.offsets_size());
    sort_tables(pages_, segment, kv_head, first_table,
                std::min(kTablesAtOnce, segment.num_tables - first_table), ids + first * tokens,
                ids + segment.ids_size() + first * (num_buckets + 2),
                scratch[static_cast<size_t>(thread)]);
  });
}

void LshIndex::clear() {
  std::lock_guard<std::mutex> one_at_a_time(build_mutex_);
  std::vector<SegmentPtr> dropped;  // freed after the lock is
  std::lock_guard<std::mutex> lock(mutex_);
  for (SegmentMap& map : by_last_block_)
    while (!map.empty()) dropped.push_back(take_out(map, map.begin()));
}

void LshIndex::forget() {
  clear();
  refused_levels_.store(0, std::memory_order_relaxed);
  std::lock_guard<std::mutex> lock(mutex_);
  segments_built_ = segments_dropped_ = builds_refused_ = 0;
}

size_t LshIndex::num_segments() const {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t segments = 0;
  for (const SegmentMap& map : by_last_block_) segments += map.size();
  return segments;
}

size_t LshIndex::num_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_bytes_;
}

size_t LshIndex::segments_built() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return segments_built_;
}

size_t LshIndex::segments_dropped() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return segments_dropped_;
}

size_t LshIndex::builds_refused() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return builds_refused_;
}

}  // namespace magicpig
