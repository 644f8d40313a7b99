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

bool LshIndex::current(const Segment& segment) const {
  return std::all_of(segment.sources.begin(), segment.sources.end(), [&](const auto& source) {
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

size_t LshIndex::seal(const Requests& requests, ThreadPool& pool) {
  std::lock_guard<std::mutex> one_at_a_time(seal_mutex_);
  drop_stale();

  const int per_segment = segment_tokens_ / pages_.layout().block_size;
  std::vector<std::shared_ptr<Segment>> missing;
  // Two requests can end a stretch in one block and differ before it. The first of the batch has
  // it; replacing it for each in turn would build both anew in every call.
  std::unordered_set<int32_t> claimed;
  for (int r = 0; r < requests.size; ++r) {
    const int32_t* blocks = requests.blocks(r);
    const std::vector<SegmentPtr> found = find(blocks, requests.seq_lens[r]);
    for (size_t j = 0; j < found.size(); ++j) {
      const int32_t* first = blocks + j * per_segment;
      if (!claimed.insert(first[per_segment - 1]).second || found[j]) continue;
      missing.push_back(allocate(first));
    }
  }

  const size_t heads = static_cast<size_t>(pages_.num_kv_heads());
  pool.run(missing.size() * heads, [&](size_t task, int) {
    build(*missing[task / heads], static_cast<int>(task % heads));
  });

  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& segment : missing) {
    SegmentPtr& place = by_last_block_[segment->sources.back().block];
    if (place) {
      num_bytes_ -= place->num_bytes();
      ++segments_dropped_;
    }
    num_bytes_ += segment->num_bytes();
    place = segment;
  }
  segments_built_ += missing.size();
  return missing.size();
}

void LshIndex::drop_stale() {
  const uint64_t now = pages_.epochs_started();
  if (now == swept_at_) return;
  swept_at_ = now;
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = by_last_block_.begin(); it != by_last_block_.end();) {
    if (current(*it->second)) {
      ++it;
      continue;
    }
    num_bytes_ -= it->second->num_bytes();
    ++segments_dropped_;
    it = by_last_block_.erase(it);
  }
}

std::shared_ptr<Segment> LshIndex::allocate(const int32_t* blocks) const {
  auto segment = std::make_shared<Segment>();
  const int num_blocks = segment_tokens_ / pages_.layout().block_size;
  segment->sources.reserve(static_cast<size_t>(num_blocks));
  for (int i = 0; i < num_blocks; ++i)
    segment->sources.push_back({blocks[i], pages_.epoch(blocks[i])});
  segment->segment_tokens = segment_tokens_;
  segment->num_buckets = 1 << num_bits_;
  segment->num_tables = pages_.layout().num_tables;

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
void LshIndex::build(Segment& segment, int kv_head) const {
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
    for (const Segment::Source& source : segment.sources) {
      for (int offset = 0; offset < block_size; offset += kTileTokens, token += kTileTokens) {
        const uint16_t* tile = pages_.tile(source.block, kv_head, offset) + first * kTileTokens;
        for (int l = 0; l < tables; ++l)
          for (int i = 0; i < kTileTokens; ++i)
            codes[l * tokens + token + i] = std::min(tile[l * kTileTokens + i], no_bucket);
      }
    }
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
  std::lock_guard<std::mutex> one_at_a_time(seal_mutex_);
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
