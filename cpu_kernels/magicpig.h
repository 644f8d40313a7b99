// MagicPIG on the CPU: host pages, LSH index and sampled decode attention.
//
// The C++ API: pointers and sizes, no Python and no torch. Callers have checked their input
// (bindings.cpp does); nothing here checks it again. Source of the method: arXiv 2410.16179, and in
// the same words vllm_magicpig/reference.py.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace magicpig {

// ---------------------------------------------------------------- instruction sets (dispatch.cpp)

enum class Isa { portable, avx2, avx512, avx512_vpopcnt };

const char* isa_name(Isa isa);
/// Whether the ISA is built into this extension and runs on this CPU.
bool isa_available(Isa isa);
/// The fastest available one.
Isa best_isa();

// --------------------------------------------------------------------- threads (thread_pool.cpp)

/// Pins the calling thread, whatever mask it has; false where the process may not use the CPU.
bool pin_this_thread(int cpu);

/// Worker threads, one pinned to each of cpus[1..]; the thread that calls run() stands in for
/// cpus[0] and is not pinned, because it belongs to the caller. A CPU may be named more than once.
///
/// Create a pool after fork(): its threads do not exist in the child, where run() throws.
class ThreadPool {
 public:
  using Microseconds = std::chrono::microseconds;
  /// Waking a sleeper costs about as much.
  static constexpr Microseconds kSpin{40};

  /// spin: how long after a job threads look for the next one before they sleep. Jobs that come
  /// within it wake nobody; a pool without jobs uses no CPU.
  /// Throws std::invalid_argument when cpus is empty or names a CPU this process may not use.
  explicit ThreadPool(const std::vector<int>& cpus, Microseconds spin = kSpin);
  /// So many threads of the process's OpenMP runtime, the caller's team, wherever they are bound.
  /// Throws std::runtime_error where it holds none.
  explicit ThreadPool(int num_openmp_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  using Body = std::function<void(size_t task, int thread)>;
  /// Runs body(task, thread) for every task in [0, num_tasks) and returns when all are done; the
  /// first exception of a task is rethrown here. Calls from several threads run one after another.
  void run(size_t num_tasks, const Body& body);

  /// A part of a job that starts when the part before it is done: `start` then runs on the calling
  /// thread, and says how many tasks there are for `body`.
  struct Phase {
    std::function<size_t()> start;
    Body body;
  };
  /// The same for each phase. Threads are called once, and none is waited for that has not come:
  /// the first phases of a short job are over before a sleeper is awake.
  void run(const std::vector<Phase>& phases);

  /// A step that runs several jobs: in_use() from its start to its end.
  class Use {
   public:
    explicit Use(ThreadPool& pool) : pool_(pool) { pool_.uses_.fetch_add(1); }
    ~Use() { pool_.uses_.fetch_sub(1); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    ThreadPool& pool_;
  };
  bool in_use() const { return uses_.load(std::memory_order_relaxed) > 0; }

  /// Somebody else has work for the pool's CPUs: its threads spin no longer than kSpin meanwhile.
  /// Beside one that spins, a niced thread would get a tenth of the CPU.
  class Guest {
   public:
    explicit Guest(const ThreadPool* pool) : pool_(pool) {
      if (pool_ != nullptr) pool_->guests_.fetch_add(1);
    }
    ~Guest() {
      if (pool_ != nullptr) pool_->guests_.fetch_sub(1);
    }
    Guest(const Guest&) = delete;
    Guest& operator=(const Guest&) = delete;

   private:
    const ThreadPool* pool_;  // null: of no pool
  };

  Microseconds spin() const { return spin_; }
  /// Threads that sleep now, and jobs that had to wake some; 0 on OpenMP's threads.
  int num_sleeping() const;
  uint64_t num_wakes() const;

 private:
  struct Workers;  // on the heap, so that a forked child can forget it

  /// Calls body(0) here and body(thread) on those that come before it returns.
  void enter(const std::function<void(int thread)>& body);

  std::atomic<int> uses_{0};
  mutable std::atomic<int> guests_{0};

  const Microseconds spin_;
  const int num_threads_;
  const long owner_pid_;
  std::unique_ptr<Workers> workers_;  // null on OpenMP's threads
  /// GOMP_parallel: calls function(data) on each thread.
  void (*openmp_)(void (*function)(void*), void* data, unsigned num_threads,
                  unsigned flags) = nullptr;
};

// ------------------------------------------------------------------------------ pages (pages.cpp)

enum class RowType { float32, bfloat16, float16 };
inline size_t element_bytes(RowType type) { return type == RowType::float32 ? 4 : 2; }

constexpr int kMaxTables = 255;  // counters are uint8
constexpr int kMaxHeadSize = 256;

/// Tokens that share a mean key, and are encoded together (signatures.h).
constexpr int kSignatureBlock = 128;

/// Codes lie in tiles of this many tokens: [token / 32][table][32], so that comparing them all
/// reads in order.
constexpr int kTileTokens = 32;

/// A chunk is what one kv head has in one block: rows [block_size][K | V][head_size], then codes
/// [block_size / 32][num_tables][32] uint16. Pages without codes have no tables.
struct PageLayout {
  RowType row_type;
  int block_size;
  int head_size;
  int num_tables;

  size_t row_bytes() const { return 2 * static_cast<size_t>(head_size) * element_bytes(row_type); }
  size_t codes_offset() const { return static_cast<size_t>(block_size) * row_bytes(); }
  size_t tile_codes() const { return static_cast<size_t>(num_tables) * kTileTokens; }
  size_t chunk_bytes() const {
    return codes_offset() + static_cast<size_t>(block_size) * static_cast<size_t>(num_tables) * 2;
  }
};

/// Rows of a caller: `bytes + token * token_stride + head * head_stride`, strides in bytes.
struct RowsView {
  const uint8_t* bytes;
  ptrdiff_t token_stride;
  ptrdiff_t head_stride;
};

/// The host pages of one layer, in the caller's memory; the write epoch of every block, and how
/// many tokens it holds.
class Pages {
 public:
  /// chunk_bytes: distance of two chunks, even and at least layout.chunk_bytes(). memory is aligned
  /// to 2 bytes at least; nothing more is assumed anywhere.
  Pages(uint8_t* memory, int num_blocks, int num_kv_heads, size_t chunk_bytes, PageLayout layout);

  const PageLayout& layout() const { return layout_; }
  int num_blocks() const { return num_blocks_; }
  int num_kv_heads() const { return num_kv_heads_; }

  uint8_t* chunk(int block, int kv_head) const {
    return memory_ + (static_cast<size_t>(block) * num_kv_heads_ + kv_head) * chunk_bytes_;
  }
  /// token / block_size by a product. Exact: the reciprocal is too large by less than block_size /
  /// 32 <= 2^11, a token's tile is below 2^25, and 2^36 is less than one.
  int block_of(int token) const {
    return static_cast<int>(static_cast<uint64_t>(token / kTileTokens) * blocks_per_tile_ >> 37);
  }
  const uint8_t* row(const int32_t* blocks, int kv_head, int token) const {
    const int block = block_of(token);
    return chunk(blocks[block], kv_head) +
           static_cast<size_t>(token - block * layout_.block_size) * layout_.row_bytes();
  }
  /// Codes of the tile [num_tables][32] that holds `offset` of a block.
  uint16_t* tile(int block, int kv_head, int offset) const {
    return reinterpret_cast<uint16_t*>(chunk(block, kv_head) + layout_.codes_offset()) +
           static_cast<size_t>(offset / kTileTokens) * layout_.tile_codes();
  }

  /// slots: block * block_size + offset, -1 skips, no slot twice, each request's in the order of
  /// its tokens. Notes the writes before any byte changes.
  void store_rows(RowsView key, RowsView value, const int64_t* slots, size_t num_tokens,
                  ThreadPool& pool);
  /// codes: [num_tokens][num_kv_heads][num_tables].
  void store_codes(const uint16_t* codes, const int64_t* slots, size_t num_tokens,
                   ThreadPool& pool);
  void load_codes(const int64_t* slots, size_t num_tokens, uint16_t* codes) const;

  /// A write to offset 0 says that the block has a new owner: it starts a new epoch. A block fills
  /// from its start, so that it holds o + 1 tokens after a write at offset o.
  ///
  /// Who writes to the pages by other means may note it later, but before anything is looked up for
  /// the new owner. Any thread may call this at any time.
  void note_writes(const int64_t* slots, size_t num_tokens);
  /// Every block starts a new epoch: for when it is not known which blocks were written.
  void distrust();
  /// Every block is empty, in a new epoch. Nothing is written meanwhile.
  void forget();

  uint64_t epoch(int block) const { return epochs_[block].load(std::memory_order_acquire); }
  /// Epochs started in all blocks together: unchanged means that nothing went stale.
  uint64_t epochs_started() const { return epochs_started_.load(std::memory_order_acquire); }

  /// Changes with every write to a stretch of kSignatureBlock tokens of a block.
  uint32_t writes(int block, int stretch) const {
    return writes_[static_cast<size_t>(block) * static_cast<size_t>(stretches_) +
                   static_cast<size_t>(stretch)]
        .load(std::memory_order_acquire);
  }
  int num_stretches() const { return stretches_; }  // of a block

  /// Tokens that a block holds, and all blocks together; blocks that hold any.
  int num_tokens(int block) const { return held_[block].load(std::memory_order_relaxed); }
  int64_t num_tokens() const { return num_tokens_.load(std::memory_order_relaxed); }
  int num_used_blocks() const { return num_used_blocks_.load(std::memory_order_relaxed); }

 private:
  void start_epoch(int64_t block);
  void note_write(int64_t block, int64_t begin, int64_t end);

  uint8_t* memory_;
  int num_blocks_;
  int num_kv_heads_;
  size_t chunk_bytes_;
  PageLayout layout_;
  uint64_t blocks_per_tile_;  // times 2^37, rounded up
  int stretches_;
  std::unique_ptr<std::atomic<uint64_t>[]> epochs_;
  std::atomic<uint64_t> epochs_started_{0};
  std::unique_ptr<std::atomic<int32_t>[]> held_;
  std::unique_ptr<std::atomic<uint32_t>[]> writes_;
  std::atomic<int64_t> num_tokens_{0};
  std::atomic<int> num_used_blocks_{0};
};

// ---------------------------------------------------------------------- LSH index (lsh_index.cpp)

/// Buckets of one kv head in one segment.
struct SegmentView {
  const uint16_t* ids;      // [L][segment_tokens], sorted by bucket, ascending within a bucket
  const uint16_t* offsets;  // [L][num_buckets + 2], see Segment
  int segment_tokens;
  int num_buckets;
  int num_tables;
};

/// Tokens per segment at most: ids are uint16.
constexpr int kMaxSegmentTokens = 65536;

/// The sealed buckets of one aligned stretch of a request, all kv heads of the layer.
///
/// An offsets row holds where each bucket starts, then where the last one ends, modulo 65,536, then
/// the bucket that holds all 65,536 tokens, if one does (kNoBucket else): its start and its end are
/// equal modulo 65,536, like an empty bucket's.
struct Segment {
  struct Source {
    int32_t block;
    uint64_t epoch;

    bool operator==(const Source& other) const {
      return block == other.block && epoch == other.epoch;
    }
  };
  static constexpr uint16_t kNoBucket = 0xffff;

  struct Free {
    size_t own_bytes;  // of segment_memory.h; 0: from malloc
    void operator()(uint16_t* memory) const;
  };

  std::vector<Source> sources;
  std::unique_ptr<uint16_t[], Free> storage{nullptr, Free{0}};  // per kv head ids, then offsets
  size_t storage_bytes = 0;
  int segment_tokens = 0;
  int num_buckets = 0;
  int num_tables = 0;
  mutable std::atomic<uint64_t> last_used{0};  // LshIndex::start_lookup

  size_t ids_size() const { return static_cast<size_t>(num_tables) * segment_tokens; }
  size_t offsets_size() const { return static_cast<size_t>(num_tables) * (num_buckets + 2); }
  SegmentView view(int kv_head) const {
    const uint16_t* ids = storage.get() + kv_head * (ids_size() + offsets_size());
    return {ids, ids + ids_size(), segment_tokens, num_buckets, num_tables};
  }
  size_t num_bytes() const { return storage_bytes + sources.size() * sizeof(Source); }
};

/// Block tables of a batch; row r starts at tables + r * stride.
struct Requests {
  const int32_t* tables;
  ptrdiff_t stride;
  const int32_t* seq_lens;
  int size;

  const int32_t* blocks(int request) const { return tables + request * stride; }
};

class GiveWay;  // give_way.h

/// Sealed segments of one layer, found by the first block of their stretch and trusted as far as
/// the blocks they cover are the request's and still have the epochs that they had when the stretch
/// was known to be complete.
///
/// A segment has one of a few sizes, the levels. A request wants as much of itself as possible in
/// segments of the largest level, of the rest as much as possible in the next, and so on: few
/// segments are few probes, and as it grows, a token is sorted once per level at most. A segment is
/// made from the codes in the pages, whatever smaller ones there are, and takes their place.
///
/// Lookups, writes to the pages and one build may all go on at once.
class LshIndex {
 public:
  using SegmentPtr = std::shared_ptr<const Segment>;
  /// A full stretch, by its blocks and their epochs; as long as one of the levels.
  using Stretch = std::vector<Segment::Source>;
  /// A segment where it lies in a request.
  struct Found {
    SegmentPtr segment;
    int begin;   // its first token
    int tokens;  // that it holds of the request's: all of its own, or as far as both agree

    int end() const { return begin + tokens; }
  };

  /// levels: tokens per segment, ascending, each a multiple of the one before and of the block
  /// size, at most kMaxSegmentTokens. max_bytes: what all segments together may take; 0: no limit.
  LshIndex(const Pages& pages, int num_bits, std::vector<int> levels, size_t max_bytes = 0)
      : pages_(pages),
        num_bits_(num_bits),
        levels_(std::move(levels)),
        max_bytes_(max_bytes),
        by_last_block_(levels_.size()) {}

  const Pages& pages() const { return pages_; }
  int num_bits() const { return num_bits_; }
  const std::vector<int>& levels() const { return levels_; }

  /// A batch looks up: what it does not find is idle, once kIdleLookups more have come.
  void start_lookup() const { lookups_.fetch_add(1, std::memory_order_relaxed); }
  /// The segments of a request: ascending and disjoint, at each place the one that holds most of
  /// it. What a segment holds beyond, of a request that parted from this one, is not this one's.
  std::vector<Found> find(const int32_t* blocks, int num_tokens) const;
  /// How many stretches of the best cover have no segment among those that find() found; smaller
  /// ones in the place of those that have no room.
  size_t num_missing(const std::vector<Found>& found, int num_tokens) const;
  /// The stretches of the requests' best covers that lack a segment and are not known to exceed
  /// max_bytes, or smaller ones in the place of those that are. Their rows and codes are in the
  /// pages, and their blocks the requests' own, while this is called.
  std::vector<Stretch> missing(const Requests& requests) const;
  /// Frees stale segments and builds those of the stretches that still lack one, in turn. A segment
  /// is kept only if its blocks have their epochs once it is built: till then, any of them may have
  /// been given to a new owner and overwritten. The smaller ones that it covers are dropped then,
  /// and idle ones before, where there is no room otherwise.
  /// Returns how many were kept.
  size_t build(const std::vector<Stretch>& stretches, ThreadPool& pool,
               const ThreadPool* gives_way_to = nullptr);
  /// Frees what is stale and builds what is missing.
  size_t seal(const Requests& requests, ThreadPool& pool) {
    build({}, pool);  // makes room, on which missing() depends
    return build(missing(requests), pool);
  }
  /// Whether a build might free a segment.
  bool may_hold_stale() const {
    return swept_at_.load(std::memory_order_relaxed) != pages_.epochs_started() &&
           num_segments() > 0;
  }
  /// Unchanged means that missing() and may_hold_stale() answer as before, but for stretches that
  /// were completed since a block was last begun.
  uint64_t changes() const {
    return pages_.epochs_started() + changes_.load(std::memory_order_relaxed);
  }
  void clear();
  /// Like clear(), and the counts below start again.
  void forget();

  size_t max_bytes() const { return max_bytes_; }
  size_t num_segments() const;
  size_t num_bytes() const;
  size_t segments_built() const;
  size_t segments_dropped() const;
  /// Builds that were not done, because max_bytes did not allow them. Until something is freed, or
  /// some steps later, the next ones of that level are not even wanted, and count no more.
  size_t builds_refused() const;

 private:
  using SegmentMap = std::unordered_map<int32_t, SegmentPtr>;

  size_t level_of(const Stretch& stretch) const;
  bool current(const Stretch& stretch) const;
  /// Tokens from the start that a segment shares with these blocks, a multiple of the smallest
  /// level.
  int shared_tokens(const Segment& segment, const int32_t* blocks, int num_tokens) const;
  struct Held {
    int first, all, wanted;  // tokens
  };
  Held held(const Stretch& stretch) const;
  void drop_stale();
  bool build_one(const Stretch& stretch, ThreadPool& pool, const ThreadPool* gives_way_to);
  bool make_room(size_t num_bytes);
  uint32_t refused_levels() const;
  std::shared_ptr<Segment> allocate(const Stretch& stretch);
  void sort_codes(Segment& segment, ThreadPool& pool, const GiveWay& to_steps) const;
  SegmentPtr take_out(SegmentMap& map, SegmentMap::iterator place);

  const Pages& pages_;
  const int num_bits_;
  const std::vector<int> levels_;
  const size_t max_bytes_;
  std::mutex build_mutex_;  // one build at a time; lookups go on meanwhile
  /// Lookups after which a segment that none of them found may go: the requests that wait for a
  /// step, behind a chunk of another's prompt say, come back within fewer.
  static constexpr uint64_t kIdleLookups = 16;
  mutable std::atomic<uint64_t> lookups_{0};
  std::atomic<uint64_t> swept_at_{0};
  std::atomic<uint64_t> changes_{0};
  std::atomic<uint32_t> refused_levels_{0};  // a bit each, until something is freed or
  std::atomic<uint64_t> refused_at_{0};      // so many lookups have come, and others are idle:
  static constexpr uint64_t kRefusedLookups = 4 * kIdleLookups;

  mutable std::mutex mutex_;               // guards what follows
  std::vector<SegmentMap> by_last_block_;  // per level
  std::unordered_map<int32_t, std::vector<SegmentPtr>> by_first_block_;
  size_t num_bytes_ = 0;
  size_t segments_built_ = 0;
  size_t segments_dropped_ = 0;
  size_t builds_refused_ = 0;
};

// ------------------------------------------------------- inclusion probability
// (inclusion_table.cpp)

/// log u over the collision probability p, for every number of matches t; inclusion_table.cpp
/// derives the error.
class InclusionTable {
 public:
  static constexpr int kIntervals = 8192;
  /// reference.LOG_U_FLOOR.
  static constexpr float kFloor = -80.0f;

  InclusionTable(int num_bits, int num_tables);

  int num_bits() const { return num_bits_; }
  int num_tables() const { return num_tables_; }

  /// [kIntervals + 1]: log P[Binomial(L, p^K) >= t] - t K log p at p = i / kIntervals, for t in
  /// [0, L + 1]; far below any logarithm that counts for t = L + 1, which never happens.
  const float* g(int t) const { return &g_[static_cast<size_t>(t) * (kIntervals + 1)]; }

 private:
  int num_bits_;
  int num_tables_;
  std::vector<float> g_;
};

/// Which tokens are in a sample: all that match in more than `matches` tables, and this fraction of
/// those that match in just as many. The marginal probability of that is what a token is weighted
/// by, u = (1 - fraction) P[c > matches] + fraction P[c >= matches].
struct Threshold {
  int matches;
  float fraction;  // in (0, 1]
};

void log_u(const InclusionTable& table, Threshold threshold, const float* cosine, size_t size,
           float* out, Isa isa);

// ----------------------------------------------------------------------- hashing (hashing.cpp)

/// The hyperplanes of one layer, as random signs between Walsh-Hadamard transforms H of `size`
/// elements: a vector is rotated three times, y = H D2 H D1 H D0 x, and block b projects it to H Db
/// y. Bit k of table l is element l % size of block l / size * K + k. Bits of one table from one
/// block would be orthogonal directions, and the tables' collisions no longer those of independent
/// ones. Source: reference.hyperplanes.
class SimHash {
 public:
  /// signs: [3 + num_blocks][size], 1 or -1; size: a power of two from head_size to kMaxSize.
  SimHash(int head_size, int num_bits, int num_tables, int size, std::vector<float> signs);

  static constexpr int kMaxSize = 256;
  static int num_blocks(int num_bits, int num_tables, int size);

  int head_size() const { return head_size_; }
  int num_bits() const { return num_bits_; }
  int num_tables() const { return num_tables_; }

  /// vectors: [num_vectors][head_size], num_heads to a token; centers: [num_heads][head_size] to
  /// subtract, or null; codes: [num_vectors][num_tables]. A bit is set where its projection is > 0.
  void hash(const float* vectors, size_t num_vectors, const float* centers, size_t num_heads,
            uint16_t* codes, Isa isa, ThreadPool& pool) const;
  /// The same in tasks.
  static size_t num_tasks(size_t num_vectors);
  void hash_task(size_t task, const float* vectors, size_t num_vectors, const float* centers,
                 size_t num_heads, uint16_t* codes, Isa isa) const;

 private:
  int head_size_;
  int num_bits_;
  int num_tables_;
  int size_;
  std::vector<float> signs_;
};

/// Sign bits to codes: projections [num_rows][L * K], codes [num_rows][L]; bit k of code l is set
/// when projection l * K + k is > 0.
void pack_codes(const float* projections, size_t num_rows, int num_tables, int num_bits,
                uint16_t* codes, Isa isa, ThreadPool& pool);

// --------------------------------------------------------------------- lookup (sample_lookup.cpp)

/// Which tokens of the middle a query head samples: those that match in min_matches tables, or as
/// many of them as row_budget allows, best matches first.
struct SampleRule {
  const InclusionTable* table;
  int min_matches;
  int sink_tokens;
  int window_tokens;
  double row_budget;  // at most this fraction of the middle, 0: no limit
  uint64_t seed;      // of the choice among tokens that match equally well

  /// Rows that one head may take of a middle, INT32_MAX without a limit; source:
  /// reference.row_limit.
  int row_limit(int middle_tokens) const;
};

/// Positions [begin, end) of a request.
struct TokenRange {
  int begin, end;

  int size() const { return end - begin; }
};

/// Tokens between sinks and window; source: reference.middle.
TokenRange middle_of(int num_tokens, const SampleRule& rule);

struct SampleInput {
  const SampleRule* rule;
  const LshIndex* index;        // null: every token is compared by code
  const uint16_t* query_codes;  // [num_reqs][num_q_heads][num_tables]
};

struct HeadSample {
  std::vector<int32_t> positions;  // ascending
  Threshold threshold;
};

/// [request][query head].
std::vector<std::vector<HeadSample>> sample(const Pages& pages, const Requests& requests,
                                            int num_q_heads, const SampleInput& input, Isa isa,
                                            ThreadPool& pool);

// --------------------------------------------------------------------------- decode (decode.cpp)

class SignaturePool;  // signatures.h
struct SignatureRule;

struct SignatureInput {
  const SignatureRule* rule;
  SignaturePool* pool;  // what lacks its signatures is encoded first
};

struct DecodeInput {
  RowsView query;         // of each token, [num_q_heads][head_size]
  const int64_t* tokens;  // of each request, rows of query and out; null: its number
  RowType query_type;
  int num_q_heads;
  float scale;
  int exact_below;
  const SampleInput* sample;         // by buckets
  const SignatureInput* signatures;  // by signatures; both null: all requests exactly
  const SimHash* hash;               // makes the sample's query codes; null: they are given
  const float* center;               // [num_kv_heads][head_size], where sampled
};

struct DecodeOutput {
  uint8_t* out;                  // of each token, [num_q_heads][head_size]
  ptrdiff_t token_stride;        // in bytes
  RowType out_type;              // what it is rounded to
  float* lse;                    // [num_reqs][num_q_heads], or null
  int32_t* sampled_rows;         // [num_reqs][num_q_heads], -1 where exact
  std::vector<int32_t> middles;  // tokens of each request that were sampled from, 0 where exact
  /// [num_reqs][num_q_heads] of signature_reference, NaN where not due or exact; else empty.
  std::vector<float> error_bars;
  uint64_t hash_ns = 0;    // of the call
  uint64_t lookup_ns = 0;  // summed over threads
  uint64_t attention_ns = 0;
  size_t unsealed_stretches = 0;  // full stretches of sampled requests without a segment
};

/// One decode step. The result does not depend on the number of threads, nor on which segments
/// exist.
void decode_attention(const Pages& pages, const Requests& requests, const DecodeInput& input,
                      DecodeOutput& output, Isa isa, ThreadPool& pool);

}  // namespace magicpig
