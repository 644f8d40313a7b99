// Memory of large segments, kept for the next one of the same size. Fresh memory costs a page fault
// for each huge page, and a thread in one cannot give way to a decode step: a tenth of a
// millisecond where the machine has the memory at hand, some milliseconds where a hypervisor has to
// fetch it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace magicpig {

/// From this size on segments have memory of their own; its start is a multiple of it.
constexpr size_t kHugePage = size_t{2} << 20;

constexpr size_t kMostIdle = 4;

/// Memory for a segment of so many bytes, a multiple of the page size and at least kHugePage. What
/// it holds is undefined. Throws std::bad_alloc.
uint16_t* take_segment_memory(size_t bytes);

/// Gives it back. Some is kept for take_segment_memory: what was given back last, and at most
/// kMostIdle times the largest size ever taken: less than the room that each layer has for a
/// merge, of which only the layer in work uses its own.
void give_back_segment_memory(uint16_t* memory, size_t bytes);

/// What is kept at the moment, bytes.
size_t idle_segment_bytes();

}  // namespace magicpig
