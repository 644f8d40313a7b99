// Decode in stream order: host work that a CUDA stream runs between its kernels.
//
// Python enqueues and never waits. What it knows then is in a StreamStep; block tables, lengths and
// slots exist only on the device, are copied into pinned memory in stream order and read by the
// first callback of the step. Callbacks run on threads of the driver, several at once where streams
// do: they touch neither Python nor CUDA, and an error becomes an exception of a later Python call.
//
// Nothing here owns a caller's memory. Callbacks hold shared_ptrs to these objects, so that whoever
// owns memory behind one can tell, by its use_count, whether a callback may still come.
#pragma once

#include <exception>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "decode_record.h"
#include "magicpig.h"
#include "signatures.h"

namespace magicpig {

/// The first error of work that nobody waits for.
class FirstError {
 public:
  void note(std::exception_ptr error);
  bool waiting() const;
  /// Throws std::runtime_error with its words and forgets it; does nothing without one.
  void raise();

 private:
  mutable std::mutex mutex_;
  std::exception_ptr error_;
};

// ------------------------------------------------------------ host callbacks (host_callbacks.cpp)

/// cuLaunchHostFunc's signature, without its headers: CUresult, CUstream and CUhostFn.
using LaunchHostFunc = int (*)(void* stream, void (*function)(void*), void* data);

/// cuLaunchHostFunc of libcuda.so.1; throws std::runtime_error where that is missing.
LaunchHostFunc find_launch_host_func();

class HostJob {
 public:
  virtual ~HostJob() = default;
  virtual void run() = 0;
  /// Instead of run(), or after it threw: leaves outputs that nobody can take for results.
  virtual void abandon() noexcept = 0;
};

/// Enqueues jobs, and keeps the first error. While that waits, later jobs are abandoned. A job is
/// freed once it ran: no launch may be captured in a graph, which would run it again.
class HostCallbacks : public std::enable_shared_from_this<HostCallbacks> {
 public:
  explicit HostCallbacks(LaunchHostFunc launch_host_func) : launch_(launch_host_func) {}

  /// Throws std::runtime_error when the driver refuses; the job is freed then.
  void launch(void* stream, std::unique_ptr<HostJob> job);
  void raise_error() { errors_.raise(); }
  /// Jobs launched and not yet finished; a finished one is destroyed.
  size_t pending() const { return pending_.load(); }

 private:
  struct Launched;
  static void call(void* launched) noexcept;

  const LaunchHostFunc launch_;
  FirstError errors_;
  std::atomic<size_t> pending_{0};
};

// ---------------------------------------------------------------------- a step (stream_step.cpp)

/// Arrays that a stream fills once per step, in stream order.
struct StreamMetadata {
  const int32_t* block_tables;  // [max_reqs][max_blocks]
  const int32_t* seq_lens;      // [max_reqs], the step's own tokens included
  const int64_t* slots;         // [max_tokens]
  int max_reqs;
  int max_blocks;
  int max_tokens;
};

/// What a step's callbacks need of its metadata, copied and checked. A padded or dummy row, which
/// has a slot of -1, has length 0 here.
struct StepContents {
  std::vector<int32_t> tables;  // [decodes, then chunks][max_blocks]
  int max_blocks = 0;
  std::vector<int32_t> seq_lens;  // likewise
  int num_decodes = 0;
  std::vector<int64_t> decode_slots;
  std::vector<int64_t> chunk_slots;  // of all chunks' tokens

  Requests decodes() const { return {tables.data(), max_blocks, seq_lens.data(), num_decodes}; }
  Requests chunks() const {
    return {tables.data() + static_cast<size_t>(num_decodes) * max_blocks, max_blocks,
            seq_lens.data() + num_decodes, static_cast<int>(seq_lens.size()) - num_decodes};
  }
};

class StreamStep {
 public:
  /// What is known when the step is enqueued.
  struct Known {
    std::vector<int32_t> decode_rows;    // of the block tables
    std::vector<int64_t> decode_tokens;  // flat positions
    std::vector<int32_t> chunk_rows;
    std::vector<int64_t> chunk_starts;  // flat positions
    std::vector<int64_t> chunk_stops;
  };

  StreamStep(std::shared_ptr<const StreamMetadata> metadata, Known known)
      : metadata_(std::move(metadata)), known_(std::move(known)) {}

  size_t num_decodes() const { return known_.decode_rows.size(); }
  size_t num_chunks() const { return known_.chunk_rows.size(); }

  /// Before a launch: contents are checked once, so all layers of a step have like pages. Throws
  /// std::invalid_argument where these differ from the first ones.
  void bind(const Pages& pages);
  /// Called by callbacks. The first call reads the metadata, and throws std::invalid_argument where
  /// it is out of range; null in every later call then, since a step has one error.
  const StepContents* contents(const Pages& pages);

 private:
  enum class State { unread, read, refused };

  StepContents read(const Pages& pages) const;

  const std::shared_ptr<const StreamMetadata> metadata_;
  const Known known_;
  std::mutex mutex_;  // guards what follows
  int num_blocks_ = 0;
  int block_size_ = 0;  // 0 before bind()
  State state_ = State::unread;
  StepContents contents_;
};

// ------------------------------------------------- segments in background (segment_builder.cpp)

/// A thread, with a pool, that builds segments for any number of indexes, one segment at a time.
/// Nothing waits for it: what lacks a segment is compared by code.
class SegmentBuilder {
 public:
  /// Throws std::invalid_argument like ThreadPool. All of its threads are niced, and give way
  /// while the pool gives_way_to, where there is one, is in use (give_way.h).
  explicit SegmentBuilder(const std::vector<int>& cpus,
                          std::shared_ptr<const ThreadPool> gives_way_to = nullptr);
  ~SegmentBuilder();  // after the segment that is being built
  SegmentBuilder(const SegmentBuilder&) = delete;
  SegmentBuilder& operator=(const SegmentBuilder&) = delete;

  /// Asks for what the requests lack, in addition to what waits already, and for stale segments to
  /// be freed. The index is alive until it is forgotten.
  void ask(LshIndex& index, const Requests& requests);
  /// Withdraws what was asked for an index; returns when nothing of it runs any more.
  void forget(const LshIndex& index);
  /// Waits until nothing is queued or running. Throws std::runtime_error in a forked child.
  void drain();
  /// Withdraws everything and ends the threads, after the segment that is being built; to ask for
  /// more does nothing. Throws like drain().
  void close();
  void raise_error() { errors_.raise(); }
  /// Indexes queued or running.
  size_t pending() const;

 private:
  struct Worker;  // on the heap, so that a forked child can forget it

  void check_owner() const;

  const long owner_pid_;
  FirstError errors_;
  std::unique_ptr<Worker> worker_;
};

// --------------------------------------------------------------------- a layer (stream_layer.cpp)

/// Buffers through which decodes go; num_decodes of a step are used, from the first.
struct DecodeExchange {
  const float* query;           // [max_decodes][num_q_heads][head_size]
  const uint8_t* key;           // rows [max_decodes][num_kv_heads][head_size]
  const uint8_t* value;         // likewise
  const uint16_t* query_codes;  // [max_decodes][num_q_heads][L], null without buckets
  const uint16_t* key_codes;    // [max_decodes][num_kv_heads][L], likewise
  float* out;                   // like query
  int max_decodes;
  int num_q_heads;
};

/// The host side of one sparse layer.
class StreamLayer : public std::enable_shared_from_this<StreamLayer> {
 public:
  struct Parts {
    Pages* pages;
    const SampleRule* rule;        // of buckets; null without
    LshIndex* index;               // null where all tokens are compared by code
    SignaturePool* signatures;     // null without
    SignatureRule signature_rule;  // of these
    DecodeExchange exchange;
    std::shared_ptr<HostCallbacks> callbacks;
    SegmentBuilder* builder;  // null: no segments are built
    float scale;
    int exact_below;  // at least 1
    Isa isa;
    ThreadPool* pool;
  };

  explicit StreamLayer(Parts parts) : parts_(std::move(parts)) {}

  /// [num_kv_heads][head_size]; once, else throws std::invalid_argument. Jobs launched before it
  /// decode exactly and store no codes.
  void set_center(std::vector<float> center);
  /// All launch nothing where the step has nothing for them.
  void launch_stored(void* stream, std::shared_ptr<StreamStep> step);
  /// Of what the step's chunks completed; a decode encodes what it finds without signatures. Throws
  /// std::invalid_argument for a layer without signatures.
  void launch_encode(void* stream, std::shared_ptr<StreamStep> step);
  void launch_decode(void* stream, std::shared_ptr<StreamStep> step);

  const DecodeRecord& record() const { return record_; }
  void forget_steps() { record_.forget(); }

 private:
  using Center = std::shared_ptr<const std::vector<float>>;
  class Job;
  class Stored;
  class Encode;
  class Decode;

  Center center() const;
  void note_chunks(const StepContents& contents, bool with_codes);
  void encode_chunks(const StepContents& contents);
  void decode(const StepContents& contents, const float* center);
  void store(const StepContents& contents, bool with_codes);
  void ask_for_segments(const Requests& requests);

  const Parts parts_;
  DecodeRecord record_;
  mutable std::mutex mutex_;  // guards the centre
  Center center_;
};

}  // namespace magicpig
