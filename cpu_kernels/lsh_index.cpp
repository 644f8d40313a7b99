// Codes of vectors, and the buckets of sealed segments.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <new>
#include <unordered_set>

#include "kernels.h"

namespace magicpig {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

/// Copies the codes of a tile; table l goes to out + l * stride. A new owner may be writing the
/// tile meanwhile: a race by design, as LshIndex::build discards what it makes of such codes.
__attribute__((no_sanitize("thread"))) void copy_codes(const uint16_t* tile, int num_tables,
                                                       uint16_t* out, size_t stride) {
  for (int l = 0; l < num_tables; ++l)
    for (int i = 0; i < kTileTokens; ++i) out[l * stride + i] = tile[l * kTileTokens + i];
}

}  // namespace

void pack_codes(const float* projections, size_t num_rows, int num_tables, int num_bits,
                uint16_t* codes, Isa isa, ThreadPool& pool) {
  constexpr size_t kRowsPerTask = 64;
  pool.run((num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](size_t task, int) {
    const size_t begin = task * kRowsPerTask;
    const size_t rows = std::min(kRowsPerTask, num_rows - begin);
    const size_t tables = static_cast<size_t>(num_tables);
    kernels_of(isa).pack_codes(projections + begin * tables * static_cast<size_t>(num_bits), rows,
                               num_tables, num_bits, codes + begin * tables);
  });
}

bool LshIndex::current(const Stretch& stretch) const {
  return std::all_of(stretch.begin(), stretch.end(), [&](const Segment::Source& source) {
    return pages_.epoch(source.block) == source.epoch;
  });
}

bool LshIndex::covers(const Segment& segment, const int32_t* blocks) const {
  for (const Segment::Source& source : segment.sources)
    if (*blocks++ != source.block || pages_.epoch(source.block) != source.epoch) return false;
  return true;
}

std::vector<LshIndex::SegmentPtr> LshIndex::find(const int32_t* blocks, int num_tokens) const {
  const int per_segment = segment_tokens_ / pages_.layout().block_size;
  std::vector<SegmentPtr> found(static_cast<size_t>(num_tokens / segment_tokens_));
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t j = 0; j < found.size(); ++j) {
      const auto it = by_last_block_.find(blocks[(j + 1) * per_segment - 1]);
      if (it != by_last_block_.end()) found[j] = it->second;
    }
  }
  for (size_t j = 0; j < found.size(); ++j)
    if (found[j] && !covers(*found[j], blocks + j * per_segment)) found[j].reset();
  return found;
}

/// Whether this very stretch has a segment.
bool LshIndex::holds(const Stretch& stretch) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = by_last_block_.find(stretch.back().block);
  return it != by_last_block_.end() && it->second->sources == stretch;
}

std::vector<LshIndex::Stretch> LshIndex::missing(const Requests& requests) const {
  const int per_segment = segment_tokens_ / pages_.layout().block_size;
  std::vector<Stretch> stretches;
  // Two requests can end a stretch in one block and differ before it. The first of the batch has
  // it; replacing it for each in turn would build both anew in every call.
  std::unordered_set<int32_t> claimed;
  for (int r = 0; r < requests.size; ++r) {
    const int32_t* blocks = requests.blocks(r);
    const std::vector<SegmentPtr> found = find(blocks, requests.seq_lens[r]);
    for (size_t j = 0; j < found.size(); ++j) {
      const int32_t* first = blocks + j * per_segment;
      if (!claimed.insert(first[per_segment - 1]).second || found[j]) continue;
      Stretch& stretch = stretches.emplace_back();
      stretch.reserve(static_cast<size_t>(per_segment));
      for (int i = 0; i < per_segment; ++i) stretch.push_back({first[i], pages_.epoch(first[i])});
    }
  }
  return stretches;
}

size_t LshIndex::build(const std::vector<Stretch>& stretches, ThreadPool& pool) {
  std::lock_guard<std::mutex> one_at_a_time(build_mutex_);
  drop_stale();

  std::vector<std::shared_ptr<Segment>> segments;
  for (const Stretch& stretch : stretches)
    if (current(stretch) && !holds(stretch)) segments.push_back(allocate(stretch));
  const size_t heads = static_cast<size_t>(pages_.num_kv_heads());
  pool.run(segments.size() * heads, [&](size_t task, int) {
    sort_codes(*segments[task / heads], static_cast<int>(task % heads));
  });

  // A seqlock's end: codes that were read too late come from writes whose epochs are seen here.
  std::atomic_thread_fence(std::memory_order_acquire);
  std::lock_guard<std::mutex> lock(mutex_);
  size_t kept = 0;
  for (const auto& segment : segments) {
    if (!current(segment->sources)) continue;
    SegmentPtr& place = by_last_block_[segment->sources.back().block];
    if (place) {
      num_bytes_ -= place->num_bytes();
      ++segments_dropped_;
    }
    num_bytes_ += segment->num_bytes();
    place = segment;
    ++kept;
  }
  segments_built_ += kept;
  return kept;
}

void LshIndex::drop_stale() {
  const uint64_t now = pages_.epochs_started();
  if (swept_at_.exchange(now, std::memory_order_relaxed) == now) return;
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = by_last_block_.begin(); it != by_last_block_.end();) {
    if (current(it->second->sources)) {
      ++it;
      continue;
    }
    num_bytes_ -= it->second->num_bytes();
    ++segments_dropped_;
    it = by_last_block_.erase(it);
  }
}

std::shared_ptr<Segment> LshIndex::allocate(const Stretch& stretch) const {
  auto segment = std::make_shared<Segment>();
  segment->sources = stretch;
  segment->segment_tokens = segment_tokens_;
  segment->num_buckets = 1 << num_bits_;
  segment->num_tables = pages_.layout().code_words;

  size_t bytes =
      pages_.num_kv_heads() * (segment->ids_size() + segment->offsets_size()) * sizeof(uint16_t);
  // A probe reads two random lines: on small pages it misses the TLB twice as well.
  const bool huge = bytes >= kHugePage;
  if (huge) bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* memory = huge ? std::aligned_alloc(kHugePage, bytes) : std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  segment->storage.reset(static_cast<uint16_t*>(memory));
  segment->storage_bytes = bytes;
#if defined(__linux__)
  if (huge) madvise(memory, bytes, MADV_HUGEPAGE);  // advice: small pages are correct, too
#endif
  return segment;
}

/// A counting sort per table. A code of 2^K or more is no bucket's: it sorts behind them all, where
/// no query finds it, as none equals it in a comparison of codes.
void LshIndex::sort_codes(Segment& segment, int kv_head) const {
  constexpr int kTablesAtOnce = 8;  // of a tile, adjacent in the page: 512 bytes
  const size_t tokens = static_cast<size_t>(segment.segment_tokens);
  const int num_tables = segment.num_tables;
  const size_t num_buckets = static_cast<size_t>(segment.num_buckets);
  const uint16_t no_bucket = static_cast<uint16_t>(num_buckets);
  const int block_size = pages_.layout().block_size;
  uint16_t* ids = segment.storage.get() + kv_head * (segment.ids_size() + segment.offsets_size());
  uint16_t* offsets = ids + segment.ids_size();
  std::vector<uint16_t> codes(kTablesAtOnce * tokens);
  std::vector<uint32_t> next(num_buckets + 1);

  for (int first = 0; first < num_tables; first += kTablesAtOnce) {
    const int tables = std::min(kTablesAtOnce, num_tables - first);
    size_t token = 0;
    for (const Segment::Source& source : segment.sources)
      for (int offset = 0; offset < block_size; offset += kTileTokens, token += kTileTokens)
        copy_codes(pages_.tile(source.block, kv_head, offset) + first * kTileTokens, tables,
                   codes.data() + token, tokens);
    // From here on the copy is what counts, not a second look at the page: a code beyond the
    // buckets would be written out of bounds.
    std::atomic_signal_fence(std::memory_order_seq_cst);
    for (uint16_t& code : codes) code = std::min(code, no_bucket);
    for (int l = 0; l < tables; ++l) {
      const uint16_t* code = codes.data() + l * tokens;
      std::fill(next.begin(), next.end(), 0);
      for (size_t i = 0; i < tokens; ++i) ++next[code[i]];
      uint32_t begin = 0;
      offsets[num_buckets + 1] = Segment::kNoBucket;
      for (size_t bucket = 0; bucket <= num_buckets; ++bucket) {
        const uint32_t size = next[bucket];
        if (size == kMaxSegmentTokens) offsets[num_buckets + 1] = static_cast<uint16_t>(bucket);
        offsets[bucket] = static_cast<uint16_t>(begin);
        next[bucket] = begin;
        begin += size;
      }
      for (size_t i = 0; i < tokens; ++i) ids[next[code[i]]++] = static_cast<uint16_t>(i);
      ids += tokens;
      offsets += num_buckets + 2;
    }
  }
}

void LshIndex::clear() {
  std::lock_guard<std::mutex> one_at_a_time(build_mutex_);
  std::lock_guard<std::mutex> lock(mutex_);
  segments_dropped_ += by_last_block_.size();
  by_last_block_.clear();
  num_bytes_ = 0;
}

size_t LshIndex::num_segments() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return by_last_block_.size();
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

}  // namespace magicpig
