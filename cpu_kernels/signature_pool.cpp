// Signatures of a layer's pages: encoded stretch by stretch, kept as long as the rows are.
#include <cstring>

#include "kernels.h"

namespace magicpig {

std::vector<float> rotation_signs_of(const SignatureLayout& layout, const int8_t* signs) {
  const size_t size = static_cast<size_t>(layout.size);
  std::vector<float> scaled(2 * size);
  for (size_t i = 0; i < size; ++i) {
    scaled[i] = static_cast<float>(signs[i]);
    scaled[size + i] = static_cast<float>(signs[size + i]) / static_cast<float>(size);
  }
  return scaled;
}

SignaturePool::SignaturePool(const Pages& pages, uint8_t* memory, SignatureLayout layout,
                             const int8_t* signs)
    : pages_(pages),
      memory_(memory),
      layout_(layout),
      signs_(rotation_signs_of(layout, signs)),
      num_kv_heads_(pages.num_kv_heads()),
      stretches_(pages.layout().block_size / kSignatureBlock),
      encoded_writes_(static_cast<size_t>(pages.num_blocks()) * static_cast<size_t>(stretches_)) {}

size_t SignaturePool::num_bytes(const Pages& pages, const SignatureLayout& layout) {
  return static_cast<size_t>(pages.num_blocks()) * static_cast<size_t>(pages.num_kv_heads()) *
         static_cast<size_t>(pages.layout().block_size / kSignatureBlock) * layout.block_bytes();
}

void SignaturePool::encode(const Requests& requests, Isa isa, ThreadPool& pool) {
  std::lock_guard<std::mutex> lock(mutex_);
  missing_.clear();
  for (int r = 0; r < requests.size; ++r) {
    const int complete = requests.seq_lens[r] / kSignatureBlock;
    const int32_t* blocks = requests.blocks(r);
    for (int i = 0; i < complete; ++i) {
      const Stretch stretch = {blocks[i / stretches_], i % stretches_};
      // Marked at once, so that requests of one prefix ask once.
      uint32_t& encoded =
          encoded_writes_[static_cast<size_t>(stretch.block * stretches_ + stretch.index)];
      const uint32_t writes = pages_.writes(stretch.block, stretch.index);
      if (encoded == writes) continue;
      encoded = writes;
      missing_.push_back(stretch);
    }
  }
  if (missing_.empty()) return;
  const Kernels& kernels = kernels_of(isa);
  const size_t heads = static_cast<size_t>(num_kv_heads_);
  pool.run(missing_.size() * heads, [&](size_t task, int) {
    encode(missing_[task / heads], static_cast<int>(task % heads), kernels);
  });
  num_encoded_.fetch_add(missing_.size(), std::memory_order_relaxed);
}

void SignaturePool::encode(Stretch stretch, int kv_head, const Kernels& kernels) {
  const PageLayout& rows = pages_.layout();
  const uint8_t* keys = pages_.chunk(stretch.block, kv_head) +
                        static_cast<size_t>(stretch.index * kSignatureBlock) * rows.row_bytes();
  kernels.encode_signatures(layout_, rows.row_type, signs_.data(), keys, rows.row_bytes(),
                            memory_ + offset(stretch.block, kv_head, stretch.index));
}

}  // namespace magicpig
