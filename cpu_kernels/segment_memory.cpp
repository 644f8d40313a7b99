// Pages from the system, huge ones where it grants them, and a short list of those given back.
#include "segment_memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace magicpig {
namespace {

/// Starting on a huge page: a probe reads two random lines, and on small pages it misses the TLB
/// twice as well. Not by malloc, which would keep what was freed without a bound, nor rounded up to
/// huge pages, which for the smallest segments would cost a quarter of their size.
uint16_t* map_pages(size_t bytes) {
#if defined(__linux__)
  void* memory = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  uint8_t* first = static_cast<uint8_t*>(memory);
  const size_t before = -reinterpret_cast<uintptr_t>(first) % kHugePage;
  if (before > 0) munmap(first, before);
  first += before;
  if (before < kHugePage) munmap(first + bytes, kHugePage - before);
  madvise(first, bytes, MADV_HUGEPAGE);  // advice: small pages are correct, too
  return reinterpret_cast<uint16_t*>(first);
#else
  void* memory = std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return static_cast<uint16_t*>(memory);
#endif
}

void unmap_pages(uint16_t* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  munmap(memory, bytes);
#else
  std::free(memory);
#endif
}

struct Block {
  uint16_t* memory;
  size_t bytes;
};

/// Of the process. A child that was forked while a thread held the mutex finds it locked for ever:
/// whoever does not get it at once goes to the system instead.
struct Idle {
  std::mutex mutex;
  std::vector<Block> blocks;  // what was given back first comes first
  size_t bytes = 0;
  size_t largest = 0;  // ever taken
};

/// Never destroyed: segments may be given back while the process ends.
Idle& idle() {
  static Idle& blocks = *new Idle;
  return blocks;
}

}  // namespace

uint16_t* take_segment_memory(size_t bytes) {
  {
    std::unique_lock<std::mutex> lock(idle().mutex, std::try_to_lock);
    if (lock.owns_lock()) {
      std::vector<Block>& blocks = idle().blocks;
      idle().largest = std::max(idle().largest, bytes);
      const auto found = std::find_if(blocks.rbegin(), blocks.rend(),
                                      [&](const Block& block) { return block.bytes == bytes; });
      if (found != blocks.rend()) {
        uint16_t* const memory = found->memory;
        blocks.erase(std::next(found).base());
        idle().bytes -= bytes;
        return memory;
      }
    }
  }
  return map_pages(bytes);
}

void give_back_segment_memory(uint16_t* memory, size_t bytes) {
  std::vector<Block> surplus = {{memory, bytes}};  // unmapped without the lock
  {
    std::unique_lock<std::mutex> lock(idle().mutex, std::try_to_lock);
    if (lock.owns_lock()) {
      std::vector<Block>& blocks = idle().blocks;
      blocks.push_back({memory, bytes});
      idle().bytes += bytes;
      surplus.clear();
      while (idle().bytes > kMostIdle * idle().largest) {
        surplus.push_back(blocks.front());
        idle().bytes -= blocks.front().bytes;
        blocks.erase(blocks.begin());
      }
    }
  }
  for (const Block& block : surplus) unmap_pages(block.memory, block.bytes);
}

size_t idle_segment_bytes() {
  std::lock_guard<std::mutex> lock(idle().mutex);
  return idle().bytes;
}

}  // namespace magicpig
