// Memory of a decode step that lives from step to step: a malloc of megabytes is given back to the
// system when freed, and costs its page faults anew each time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace magicpig {

/// Gives out memory until it is reset. Not for several threads at once.
class Arena {
 public:
  /// Not initialised, aligned to a cache line; T needs no destructor.
  template <class T>
  T* take(size_t size) {
    return reinterpret_cast<T*>(take_bytes(size * sizeof(T)));
  }
  /// Keeps the first `size` of what was taken last.
  template <class T>
  void keep(T* taken, size_t size) {
    uint8_t* const end = reinterpret_cast<uint8_t*>(taken + size);
    used_ = (static_cast<size_t>(end - chunks_[chunk_].begin) + kLine - 1) / kLine * kLine;
  }
  /// Everything taken is free again.
  void reset() {
    chunk_ = 0;
    used_ = 0;
  }

 private:
  static constexpr size_t kLine = 64;
  static constexpr size_t kChunkBytes = size_t{1} << 20;

  struct Chunk {
    std::unique_ptr<uint8_t[]> memory;
    uint8_t* begin;
    size_t bytes;
  };

  uint8_t* take_bytes(size_t bytes) {
    bytes = (bytes + kLine - 1) / kLine * kLine;
    while (chunk_ < chunks_.size() && used_ + bytes > chunks_[chunk_].bytes) {
      ++chunk_;
      used_ = 0;
    }
    if (chunk_ == chunks_.size()) {
      const size_t size = bytes > kChunkBytes ? bytes : kChunkBytes;
      Chunk chunk = {std::unique_ptr<uint8_t[]>(new uint8_t[size + kLine]), nullptr, size};
      const uintptr_t address = reinterpret_cast<uintptr_t>(chunk.memory.get());
      chunk.begin = chunk.memory.get() + (kLine - address % kLine) % kLine;
      chunks_.push_back(std::move(chunk));
    }
    uint8_t* taken = chunks_[chunk_].begin + used_;
    used_ += bytes;
    return taken;
  }

  std::vector<Chunk> chunks_;
  size_t chunk_ = 0;
  size_t used_ = 0;
};

}  // namespace magicpig
