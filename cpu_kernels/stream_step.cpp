// A step's metadata: read once, by the step's first callback, and checked like any other input.
#include "checks.h"
#include "stream.h"

namespace magicpig {

void StreamStep::bind(const Pages& pages) {
  std::lock_guard<std::mutex> lock(mutex_);
  const int block_size = pages.layout().block_size;
  if (block_size_ == 0) {
    num_blocks_ = pages.num_blocks();
    block_size_ = block_size;
  }
  if (pages.num_blocks() != num_blocks_ || block_size != block_size_)
    refuse("These pages have ", pages.num_blocks(), " blocks of ", block_size,
           ", but the step was first used with ", num_blocks_, " of ", block_size_,
           "; make a StreamStep for each block table.");
}

const StepContents* StreamStep::contents(const Pages& pages) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (state_ == State::unread) {
    state_ = State::refused;
    contents_ = read(pages);
    state_ = State::read;
  }
  return state_ == State::read ? &contents_ : nullptr;
}

/// What is checked is the copy: should the stream write the metadata too early, then wrong blocks
/// are read, but none that do not exist.
StepContents StreamStep::read(const Pages& pages) const {
  StepContents contents;
  std::vector<int> rows;
  const auto read_slot = [&](int64_t token, std::vector<int64_t>& slots) {
    slots.push_back(metadata_->slots[token]);
    check_slot(pages, token, slots.back(), -1);
    return slots.back() >= 0;
  };
  const auto read_row = [&](int row, bool stored) {
    const int32_t seq_len = stored ? metadata_->seq_lens[row] : 0;
    const int used = check_seq_len(pages, row, metadata_->max_blocks, seq_len);
    contents.max_blocks = std::max(contents.max_blocks, used);
    contents.seq_lens.push_back(seq_len);
    rows.push_back(row);
  };
  for (size_t i = 0; i < num_decodes(); ++i)
    read_row(known_.decode_rows[i], read_slot(known_.decode_tokens[i], contents.decode_slots));
  for (size_t i = 0; i < num_chunks(); ++i) {
    bool stored = true;
    for (int64_t token = known_.chunk_starts[i]; token < known_.chunk_stops[i]; ++token)
      stored &= read_slot(token, contents.chunk_slots);
    read_row(known_.chunk_rows[i], stored);
  }

  contents.num_decodes = static_cast<int>(num_decodes());
  contents.tables.resize(rows.size() * static_cast<size_t>(contents.max_blocks));
  int32_t* blocks = contents.tables.data();
  for (size_t i = 0; i < rows.size(); ++i, blocks += contents.max_blocks) {
    const int32_t seq_len = contents.seq_lens[i];
    const int used = check_seq_len(pages, rows[i], metadata_->max_blocks, seq_len);
    std::copy_n(metadata_->block_tables + static_cast<size_t>(rows[i]) * metadata_->max_blocks,
                used, blocks);
    check_blocks(pages, rows[i], blocks, used, seq_len);
  }
  return contents;
}

}  // namespace magicpig
