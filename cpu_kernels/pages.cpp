// Host pages: where a row and a code lie, and who owns a block since when.
#include <cstring>

#include "magicpig.h"

namespace magicpig {
namespace {

/// Tokens a task stores: some tens of microseconds, and two tasks rarely share a tile of codes.
constexpr size_t kTokensPerTask = 256;

size_t num_tasks(size_t num_tokens) { return (num_tokens + kTokensPerTask - 1) / kTokensPerTask; }

template <class Body>
void for_each_token(size_t num_tokens, ThreadPool& pool, const Body& body) {
  pool.run(num_tasks(num_tokens), [&](size_t task, int) {
    const size_t begin = task * kTokensPerTask;
    const size_t end = begin + kTokensPerTask < num_tokens ? begin + kTokensPerTask : num_tokens;
    for (size_t token = begin; token < end; ++token) body(token);
  });
}

}  // namespace

Pages::Pages(uint8_t* memory, int num_blocks, int num_kv_heads, size_t chunk_bytes,
             PageLayout layout)
    : memory_(memory),
      num_blocks_(num_blocks),
      num_kv_heads_(num_kv_heads),
      chunk_bytes_(chunk_bytes),
      layout_(layout),
      blocks_per_tile_(((uint64_t{1} << 37) * kTileTokens + layout.block_size - 1) /
                       static_cast<uint64_t>(layout.block_size)),
      stretches_((layout.block_size + kSignatureBlock - 1) / kSignatureBlock),
      epochs_(new std::atomic<uint64_t>[static_cast<size_t>(num_blocks)]),
      held_(new std::atomic<int32_t>[static_cast<size_t>(num_blocks)]),
      writes_(new std::atomic<uint32_t>[static_cast<size_t>(num_blocks) *
                                        static_cast<size_t>(stretches_)]) {
  for (int block = 0; block < num_blocks; ++block) {
    epochs_[block].store(0);
    held_[block].store(0);
    for (int i = 0; i < stretches_; ++i) writes_[block * stretches_ + i].store(1);
  }
}

void Pages::note_write(int64_t block, int64_t begin, int64_t end) {
  for (int64_t i = begin / kSignatureBlock; i * kSignatureBlock < end; ++i)
    writes_[block * stretches_ + i].fetch_add(1, std::memory_order_acq_rel);
}

void Pages::start_epoch(int64_t block) {
  epochs_[block].fetch_add(1, std::memory_order_acq_rel);
  epochs_started_.fetch_add(1, std::memory_order_acq_rel);
}

void Pages::note_writes(const int64_t* slots, size_t num_tokens) {
  size_t token = 0;
  while (token < num_tokens) {
    const int64_t slot = slots[token++];
    if (slot < 0) continue;
    const int64_t block = slot / layout_.block_size;
    const int64_t offset = slot % layout_.block_size;
    if (offset == 0) start_epoch(block);
    // The rest of a run within the block is counted by its last token.
    int64_t run = 1;
    while (token < num_tokens && offset + run < layout_.block_size && slots[token] == slot + run) {
      ++token;
      ++run;
    }
    note_write(block, offset, offset + run);
    const int32_t held = static_cast<int32_t>(offset + run);
    const int32_t before = held_[block].exchange(held, std::memory_order_relaxed);
    num_tokens_.fetch_add(held - before, std::memory_order_relaxed);
    if (before == 0) num_used_blocks_.fetch_add(1, std::memory_order_relaxed);
  }
  // What is written from here on comes after the epochs for whoever reads it (LshIndex::build).
  std::atomic_thread_fence(std::memory_order_release);
}

void Pages::distrust() {
  for (int block = 0; block < num_blocks_; ++block) {
    start_epoch(block);
    note_write(block, 0, layout_.block_size);
  }
}

void Pages::forget() {
  distrust();
  for (int block = 0; block < num_blocks_; ++block)
    held_[block].store(0, std::memory_order_relaxed);
  num_tokens_.store(0, std::memory_order_relaxed);
  num_used_blocks_.store(0, std::memory_order_relaxed);
}

void Pages::store_rows(RowsView key, RowsView value, const int64_t* slots, size_t num_tokens,
                       ThreadPool& pool) {
  note_writes(slots, num_tokens);
  const size_t half = layout_.row_bytes() / 2;
  for_each_token(num_tokens, pool, [&](size_t token) {
    if (slots[token] < 0) return;
    const int block = static_cast<int>(slots[token] / layout_.block_size);
    const size_t offset = static_cast<size_t>(slots[token] % layout_.block_size);
    const ptrdiff_t position = static_cast<ptrdiff_t>(token);
    for (int head = 0; head < num_kv_heads_; ++head) {
      uint8_t* row = chunk(block, head) + offset * layout_.row_bytes();
      std::memcpy(row, key.bytes + position * key.token_stride + head * key.head_stride, half);
      std::memcpy(row + half,
                  value.bytes + position * value.token_stride + head * value.head_stride, half);
    }
  });
}

void Pages::store_codes(const uint16_t* codes, const int64_t* slots, size_t num_tokens,
                        ThreadPool& pool) {
  const size_t num_tables = static_cast<size_t>(layout_.num_tables);
  for_each_token(num_tokens, pool, [&](size_t token) {
    if (slots[token] < 0) return;
    const int block = static_cast<int>(slots[token] / layout_.block_size);
    const int offset = static_cast<int>(slots[token] % layout_.block_size);
    for (int head = 0; head < num_kv_heads_; ++head) {
      const uint16_t* from =
          codes + (token * static_cast<size_t>(num_kv_heads_) + head) * num_tables;
      uint16_t* to = tile(block, head, offset) + offset % kTileTokens;
      for (size_t l = 0; l < num_tables; ++l) to[l * kTileTokens] = from[l];
    }
  });
}

void Pages::load_codes(const int64_t* slots, size_t num_tokens, uint16_t* codes) const {
  const size_t num_tables = static_cast<size_t>(layout_.num_tables);
  for (size_t token = 0; token < num_tokens; ++token) {
    const int block = static_cast<int>(slots[token] / layout_.block_size);
    const int offset = static_cast<int>(slots[token] % layout_.block_size);
    for (int head = 0; head < num_kv_heads_; ++head) {
      const uint16_t* from = tile(block, head, offset) + offset % kTileTokens;
      uint16_t* to = codes + (token * static_cast<size_t>(num_kv_heads_) + head) * num_tables;
      for (size_t l = 0; l < num_tables; ++l) to[l] = from[l * kTileTokens];
    }
  }
}

}  // namespace magicpig
