// Lookup and attention, in the words of simd.h. Compiled once per instruction set, inside that
// ISA's anonymous namespace: nothing here may instantiate a std:: template, whose weak copy would
// carry this ISA's instructions into the rest of the process.
#include "simd.h"

inline int smaller(int a, int b) { return a < b ? a : b; }

/// Into L2: L1 has too few misses in flight for rows and runs of ids (a quarter of the time on Zen
/// 4).
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_lines(const void* p, size_t bytes) {
  const char* const end = static_cast<const char*>(p) + bytes;
  const char* line = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) / 64 * 64);
  for (; line < end; line += 64) prefetch(line);
}

/// Whether a row can end within a vector: head sizes are multiples of 8.
constexpr bool kRaggedRows = kLanes > 8;

/// Calls body(d, lanes) for each vector of a row. Full ones cost no masking.
template <class Body>
inline void for_each_vector(int head_size, const Body& body) {
  int d = 0;
  for (; d + kLanes <= head_size; d += kLanes) body(d, AllLanes{});
  if constexpr (kRaggedRows)
    if (d < head_size) body(d, first_lanes(head_size - d));
}

// ------------------------------------------------------------------------------------- elementary

/// e^x for x <= 0, relative error below 2e-7 (Cephes expf); 0 below -87. NaN stays NaN.
inline Vec exp_of_negative(Vec x) {
  const Vec lowest = broadcast(-87.0f);
  const Vec clamped = maximum(lowest, x);
  const Vec n = round_nearest(clamped * broadcast(1.44269504f));
  // ln 2 in two parts: n times the first is exact.
  Vec r = multiply_add(n, broadcast(-0.693359375f), clamped);
  r = multiply_add(n, broadcast(2.12194440e-4f), r);
  Vec y = broadcast(1.9875691500e-4f);
  y = multiply_add(y, r, broadcast(1.3981999507e-3f));
  y = multiply_add(y, r, broadcast(8.3334519073e-3f));
  y = multiply_add(y, r, broadcast(4.1665795894e-2f));
  y = multiply_add(y, r, broadcast(1.6666665459e-1f));
  y = multiply_add(y, r, broadcast(5.0000001201e-1f));
  y = multiply_add(y, r * r, r) + broadcast(1.0f);
  return select(less(x, lowest), broadcast(0.0f), y * power_of_two(n));
}

/// log x of a normal x > 0, relative error below 2e-7 (Cephes logf).
inline Vec log_of(Vec x) {
  Vec e;
  const Vec m = split_exponent(x, &e) - broadcast(1.0f);
  Vec y = broadcast(7.0376836292e-2f);
  y = multiply_add(y, m, broadcast(-1.1514610310e-1f));
  y = multiply_add(y, m, broadcast(1.1676998740e-1f));
  y = multiply_add(y, m, broadcast(-1.2420140846e-1f));
  y = multiply_add(y, m, broadcast(1.4249322787e-1f));
  y = multiply_add(y, m, broadcast(-1.6668057665e-1f));
  y = multiply_add(y, m, broadcast(2.0000714765e-1f));
  y = multiply_add(y, m, broadcast(-2.4999993993e-1f));
  y = multiply_add(y, m, broadcast(3.3333331174e-1f));
  const Vec square = m * m;
  y = y * m * square;
  y = multiply_add(e, broadcast(-2.12194440e-4f), y);
  y = multiply_add(square, broadcast(-0.5f), y);
  return multiply_add(e, broadcast(0.693359375f), m + y);
}

/// p = 1 - acos(cosine) / pi, with acos of error 2e-8 (Abramowitz and Stegun 4.4.46). For negative
/// cosines it is acos(-cosine) / pi, which keeps p's relative precision near 0.
inline Vec collision_probability(Vec cosine) {
  const Vec a = minimum(absolute(cosine), broadcast(1.0f));
  Vec y = broadcast(-0.0012624911f);
  y = multiply_add(y, a, broadcast(0.0066700901f));
  y = multiply_add(y, a, broadcast(-0.0170881256f));
  y = multiply_add(y, a, broadcast(0.0308918810f));
  y = multiply_add(y, a, broadcast(-0.0501743046f));
  y = multiply_add(y, a, broadcast(0.0889789874f));
  y = multiply_add(y, a, broadcast(-0.2145988016f));
  y = multiply_add(y, a, broadcast(1.5707963050f));
  const Vec turn = square_root(broadcast(1.0f) - a) * y * broadcast(0.318309886f);
  return select(less(cosine, broadcast(0.0f)), turn, broadcast(1.0f) - turn);
}

/// A value between the entries of a table over p.
struct Interpolation {
  IntVec index;
  Vec fraction;
};
inline Interpolation interpolation_at(Vec p) {
  const float intervals = InclusionTable::kIntervals;
  // NaN becomes 0 here: the index stays inside the table whatever the rows hold.
  const Vec at = minimum(maximum(p * broadcast(intervals), broadcast(0.0f)), broadcast(intervals));
  const IntVec index = truncate(minimum(at, broadcast(intervals - 1)));
  return {index, at - to_float(index)};
}
inline Vec interpolate(const float* g, Interpolation at) {
  const Vec low = gather(g, at.index);
  const Vec high = gather(g + 1, at.index);
  return multiply_add(at.fraction, high - low, low);
}

/// log u at these cosines; see Threshold and inclusion_table.cpp.
inline Vec log_inclusion(const Weighting& w, Vec cosine) {
  const Vec p = collision_probability(cosine);
  const Interpolation at = interpolation_at(p);
  const Vec log_p = log_of(maximum(p, broadcast(1e-30f)));
  const Vec g = interpolate(w.g_at, at);
  Vec sum = multiply_add(broadcast(w.power_at), log_p, g);
  if (w.fraction < 1.0f) {
    // log(fraction + (1 - fraction) P[c > t] / P[c >= t])
    const Vec more = multiply_add(broadcast(w.num_bits), log_p, interpolate(w.g_above, at) - g);
    const Vec ratio = exp_of_negative(minimum(more, broadcast(0.0f)));
    sum = sum + log_of(multiply_add(broadcast(1.0f - w.fraction), ratio, broadcast(w.fraction)));
  }
  return maximum(sum, broadcast(InclusionTable::kFloor));
}

void log_u(const Weighting& weighting, const float* cosine, size_t size, float* out) {
  float padded[kLanes] = {};
  for (size_t i = 0; i < size; i += kLanes) {
    const size_t lanes = size - i < kLanes ? size - i : kLanes;
    memcpy(padded, cosine + i, lanes * sizeof(float));
    store(padded, log_inclusion(weighting, load(padded)));
    memcpy(out + i, padded, lanes * sizeof(float));
  }
}

// ------------------------------------------------------------------------------------------ codes

/// All signs of a row as one string of bits, then fields of K bits cut from it.
void pack_codes(const float* projections, size_t num_rows, int num_tables, int num_bits,
                uint16_t* codes) {
  constexpr int kMaxSigns = kMaxTables * 16;
  uint8_t signs[kMaxSigns / 8 + 3];  // a field is read as 3 bytes
  const int num_signs = num_tables * num_bits;
  const uint32_t mask = (1u << num_bits) - 1;
  memset(signs, 0, sizeof signs);
  for (size_t row = 0; row < num_rows; ++row) {
    const float* x = projections + row * static_cast<size_t>(num_signs);
    uint16_t* out = codes + row * static_cast<size_t>(num_tables);
    int i = 0;
    for (; i + 8 <= num_signs; i += 8)
      signs[i / 8] = static_cast<uint8_t>(positive_bits_of_8(x + i));
    if (i < num_signs) {
      uint32_t bits = 0;
      for (int k = i; k < num_signs; ++k) bits |= static_cast<uint32_t>(x[k] > 0) << (k - i);
      signs[i / 8] = static_cast<uint8_t>(bits);
    }
    for (int l = 0, bit = 0; l < num_tables; ++l, bit += num_bits) {
      const uint8_t* b = signs + bit / 8;
      const uint32_t field =
          b[0] | static_cast<uint32_t>(b[1]) << 8 | static_cast<uint32_t>(b[2]) << 16;
      out[l] = static_cast<uint16_t>(field >> (bit % 8) & mask);
    }
  }
}

/// The butterflies of kRadix rows of a Walsh-Hadamard transform, from v[kFirst] on: the nearest
/// rows first. By recursion, as GCC 12 neither unrolls a loop over 16 rows nor keeps them in
/// registers.
template <int kRadix, int kFirst = 0, int kRows>
inline void butterflies(Vec (&v)[kRows]) {
  if constexpr (kRadix > 1) {
    constexpr int kHalf = kRadix / 2;
    butterflies<kHalf, kFirst>(v);
    butterflies<kHalf, kFirst + kHalf>(v);
    for (int i = kFirst; i < kFirst + kHalf; ++i) {
      const Vec sum = v[i] + v[i + kHalf];
      v[i + kHalf] = v[i] - v[i + kHalf];
      v[i] = sum;
    }
  }
}

/// The same in place for rows that lie `step` floats apart.
template <int kRadix>
inline void butterflies(float* x, int step) {
  Vec v[kRadix];
  for (int i = 0; i < kRadix; ++i) v[i] = load(x + i * step);
  butterflies<kRadix>(v);
  for (int i = 0; i < kRadix; ++i) store(x + i * step, v[i]);
}

template <int kRadix>
inline void transform_pass(float* x, int size, int half) {
  for (int block = 0; block < size; block += kRadix * half)
    for (int i = block; i < block + half; ++i) butterflies<kRadix>(x + i * kLanes, half * kLanes);
}

/// The Walsh-Hadamard transform of x [size][kLanes] over its rows, in place, in natural order.
inline void transform(float* x, int size) {
  int half = 1;
  for (; 8 * half <= size; half *= 8) transform_pass<8>(x, size, half);
  if (4 * half <= size) {
    transform_pass<4>(x, size, half);
    half *= 4;
  }
  if (2 * half <= size) transform_pass<2>(x, size, half);
}

/// to = signs * from, row by row; then transformed.
inline void rotate(const float* from, const float* signs, int size, float* to) {
  for (int i = 0; i < size; ++i)
    store(to + i * kLanes, load(from + i * kLanes) * broadcast(signs[i]));
  transform(to, size);
}

/// Adds bit k to the sums of `count` rows, where their values are positive.
inline void add_bits(const float* values, int count, int k, float* sums) {
  const Vec zero = broadcast(0.0f), bit = broadcast(static_cast<float>(1 << k));
  for (int i = 0; i < count; ++i) {
    const Vec positive = select(less(zero, load(values + i * kLanes)), bit, zero);
    store(sums + i * kLanes, load(sums + i * kLanes) + positive);
  }
}

/// kLanes vectors at a time, one in each lane: x rotated three times by itself, then once more for
/// each block.
void hash(const HashPlan& plan, const float* vectors, size_t num_vectors, const float* centers,
          size_t num_heads, size_t first_head, uint16_t* codes) {
  alignas(64) float x[kMaxTransform * kLanes], y[kMaxTransform * kLanes];
  alignas(64) float rotated[kMaxTransform * kLanes], sums[kMaxTransform * kLanes];
  const int size = plan.size;
  for (size_t first = 0; first < num_vectors; first += kLanes) {
    const size_t left = num_vectors - first;
    const int lanes = left < static_cast<size_t>(kLanes) ? static_cast<int>(left) : kLanes;
    memset(x, 0, static_cast<size_t>(size) * kLanes * sizeof(float));
    for (int lane = 0; lane < lanes; ++lane) {
      const size_t vector = first + static_cast<size_t>(lane);
      const float* from = vectors + vector * static_cast<size_t>(plan.head_size);
      for (int d = 0; d < plan.head_size; ++d) x[d * kLanes + lane] = from[d];
      if (centers == nullptr) continue;
      const float* center =
          centers + (first_head + vector) % num_heads * static_cast<size_t>(plan.head_size);
      for (int d = 0; d < plan.head_size; ++d) x[d * kLanes + lane] -= center[d];
    }
    rotate(x, plan.signs, size, y);
    rotate(y, plan.signs + size, size, x);
    rotate(x, plan.signs + 2 * size, size, rotated);

    const float* signs = plan.signs + 3 * size;
    // As many tables at a time as a transform has rows.
    for (int table = 0; table < plan.num_tables; table += size) {
      const int tables = smaller(size, plan.num_tables - table);
      memset(sums, 0, static_cast<size_t>(tables) * kLanes * sizeof(float));
      for (int k = 0; k < plan.num_bits; ++k, signs += size) {
        rotate(rotated, signs, size, y);
        add_bits(y, tables, k, sums);
      }
      for (int lane = 0; lane < lanes; ++lane) {
        uint16_t* to = codes +
                       (first + static_cast<size_t>(lane)) * static_cast<size_t>(plan.num_tables) +
                       table;
        for (int i = 0; i < tables; ++i)
          to[i] = static_cast<uint16_t>(static_cast<int>(sums[i * kLanes + lane]));
      }
    }
  }
}

// ----------------------------------------------------------------------------------------- lookup

struct Run {
  const uint16_t* ids;
  uint32_t size;
};

constexpr int kHeadsAtOnce = 4;
constexpr int kTablesAhead = 24;

/// Ids of one bucket.
inline Run bucket(const SegmentView& s, int table, uint16_t code) {
  const uint16_t* offsets = s.offsets + static_cast<size_t>(table) * (s.num_buckets + 2);
  const uint32_t begin = offsets[code];
  uint32_t size = static_cast<uint16_t>(offsets[code + 1] - begin);
  // The last entry lies on another cache line: read it only where it can matter.
  if (size == 0 && s.segment_tokens == kMaxSegmentTokens && offsets[s.num_buckets + 1] == code)
    size = kMaxSegmentTokens;
  return {s.ids + static_cast<size_t>(table) * s.segment_tokens + begin, size};
}

/// Of a longer run the hardware prefetcher takes the rest.
inline void fetch_ids(Run run) {
  constexpr uint32_t kMostIds = 512;
  const size_t size = run.size < kMostIds ? run.size : kMostIds;
  prefetch_lines(run.ids, size * sizeof(uint16_t));
}

inline void count(Run run, uint8_t* counters) {
  uint32_t i = 0;
  for (; i + 4 <= run.size; i += 4) {
    ++counters[run.ids[i]];
    ++counters[run.ids[i + 1]];
    ++counters[run.ids[i + 2]];
    ++counters[run.ids[i + 3]];
  }
  for (; i < run.size; ++i) ++counters[run.ids[i]];
}

/// Appends the scores of a tile's matches.
inline void add_scores(uint32_t word, const uint8_t* scores, int head, const Matches& matches) {
  uint8_t* const begin = matches.scores + head * matches.score_stride;
  size_t size = matches.num_scores[head];
  for (; word != 0; word &= word - 1) begin[size++] = scores[__builtin_ctz(word)];
  matches.num_scores[head] = size;
}

/// Turns the counters of one head into matches, and to zero.
inline void collect(uint8_t* counters, int num_tokens, int min_matches, int head,
                    const Matches& matches) {
  uint32_t* words = matches.words + head * matches.head_stride;
  if (matches.scores == nullptr) {
    for (int i = 0; i < num_tokens; i += kTileTokens)
      words[i / kTileTokens] = take_at_least(counters + i, min_matches);
    return;
  }
  for (int i = 0; i < num_tokens; i += kTileTokens) {
    uint8_t scores[kTileTokens];
    memcpy(scores, counters + i, kTileTokens);
    const uint32_t word = take_at_least(counters + i, min_matches);
    words[i / kTileTokens] = word;
    if (word != 0) add_scores(word, scores, head, matches);
  }
}

/// First where the ids of all probes lie, table by table, as the heads' buckets of one table are
/// near each other. Then, head by head, all ids are fetched before the first is counted. Measured
/// on Zen 4 with 64K tokens: fetching them between the counting, at any distance, takes two thirds
/// longer, and fetching the next head's before this one is counted three times as long.
void match_segment(const SegmentView& s, const uint16_t* query_codes, int num_heads,
                   int min_matches, uint8_t* counters, const Matches& matches) {
  Run runs[kHeadsAtOnce * kMaxTables];
  const int num_tables = s.num_tables;
  const size_t offsets_stride = static_cast<size_t>(s.num_buckets) + 2;
  for (int first = 0; first < num_heads; first += kHeadsAtOnce) {
    const int heads = smaller(kHeadsAtOnce, num_heads - first);
    const uint16_t* codes = query_codes + static_cast<size_t>(first) * num_tables;
    for (int table = -kTablesAhead; table < num_tables; ++table) {
      const int ahead = table + kTablesAhead;
      if (ahead < num_tables)
        for (int h = 0; h < heads; ++h)
          prefetch(s.offsets + ahead * offsets_stride + codes[h * num_tables + ahead]);
      if (table < 0) continue;
      for (int h = 0; h < heads; ++h)
        runs[h * num_tables + table] = bucket(s, table, codes[h * num_tables + table]);
    }
    for (int h = 0; h < heads; ++h) {
      const Run* const own = runs + h * num_tables;
      for (int table = 0; table < num_tables; ++table) fetch_ids(own[table]);
      for (int table = 0; table < num_tables; ++table) count(own[table], counters);
      collect(counters, s.segment_tokens, min_matches, first + h, matches);
    }
  }
}

/// Appends token + i for each bit i of word, in their order; 64 places from next on are writable,
/// or 32 where the upper half is zero.
inline int32_t* append_tokens(uint64_t word, int32_t token, int32_t* next) {
  // Most words hold few bits: writing four whatever they are costs less than guessing how many, and
  // far less than a vector that is compressed and stored across two lines.
  constexpr int kAtOnce = 4;
  const int size = __builtin_popcountll(word);
  int written = 0;
  do {
    for (int i = 0; i < kAtOnce; ++i, word &= word - 1)
      next[written + i] = token + __builtin_ctzll(word | uint64_t{1} << 63);
    written += kAtOnce;
  } while (written < size);
  return next + size;
}

int list_tokens(const uint32_t* words, int num_words, int32_t first, int32_t* tokens) {
  int32_t* next = tokens;
  int w = 0;
  for (; w + 2 <= num_words; w += 2) {
    const uint64_t word = words[w] | static_cast<uint64_t>(words[w + 1]) << 32;
    next = append_tokens(word, first + w * kTileTokens, next);
  }
  if (w < num_words) next = append_tokens(words[w], first + w * kTileTokens, next);
  return static_cast<int>(next - tokens);
}

inline void add_tile(Tile16 scores, int tile, int min_matches, int head, const Matches& matches) {
  const uint32_t word = at_least(scores, min_matches);
  matches.words[head * matches.head_stride + tile] = word;
  if (matches.scores == nullptr || word == 0) return;
  uint8_t bytes[kTileTokens];
  store_bytes(bytes, scores);
  add_scores(word, bytes, head, matches);
}

template <int kHeads>
inline void match_tile(const uint16_t* tile, int index, int num_tables, const uint16_t* query_codes,
                       int head, int min_matches, const Matches& matches) {
  Tile16 counts[kHeads];
  for (int h = 0; h < kHeads; ++h) counts[h] = zero_tile();
  for (int l = 0; l < num_tables; ++l) {
    const Tile16 codes = load_tile(tile + l * kTileTokens);
    for (int h = 0; h < kHeads; ++h)
      counts[h] = count_equal(counts[h], codes, query_codes[(head + h) * num_tables + l]);
  }
  for (int h = 0; h < kHeads; ++h) add_tile(counts[h], index, min_matches, head + h, matches);
}

void match_tiles(const uint16_t* tiles, int num_tiles, int num_tables, const uint16_t* query_codes,
                 int num_heads, int min_matches, const Matches& matches) {
  for (int i = 0; i < num_tiles; ++i) {
    const uint16_t* tile = tiles + static_cast<size_t>(i) * num_tables * kTileTokens;
    int head = 0;
    for (; head + 4 <= num_heads; head += 4)
      match_tile<4>(tile, i, num_tables, query_codes, head, min_matches, matches);
    for (; head + 2 <= num_heads; head += 2)
      match_tile<2>(tile, i, num_tables, query_codes, head, min_matches, matches);
    if (head < num_heads)
      match_tile<1>(tile, i, num_tables, query_codes, head, min_matches, matches);
  }
}

// -------------------------------------------------------------------------------------- attention

/// Rows per step of the online softmax: their keys and values stay in L1 or L2 between the passes.
constexpr int kTileRows = 64;
/// Rows fetched ahead of the one in work.
constexpr int kRowsAhead = 32;

/// The accumulators of one pass fit the registers of every ISA.
constexpr int kAccumulators = 8;

struct Logits {
  float dot[4][kTileRows];        // q.k, or q.(k - center) where weighted; then weights
  float centred_norm[kTileRows];  // |k - center|^2
};

/// Dot products of a tile's keys with kHeads queries; where weighted, of k - center, and its
/// square. rows may be read up to rows_left for prefetching.
template <class Element, int kHeads, bool kWeighted>
inline void dot_products(const AttendArgs& args, const float* queries, const uint8_t* const* rows,
                         int num_rows, int rows_left, bool fetch_ahead, Logits& logits) {
  constexpr int kKinds = kWeighted ? 2 : 1;
  constexpr int kRows = kAccumulators / (kHeads * kKinds);
  const int head_size = args.head_size;
  const size_t row_bytes = 2 * static_cast<size_t>(head_size) * Element::kBytes;
  for (int r = 0; r < num_rows; r += kRows) {
    const uint8_t* row[kRows];
    for (int i = 0; i < kRows; ++i) {
      row[i] = rows[smaller(r + i, num_rows - 1)];
      if (fetch_ahead && r + i + kRowsAhead < rows_left)
        prefetch_lines(rows[r + i + kRowsAhead], row_bytes);
    }
    Vec sums[kAccumulators];
    for (int i = 0; i < kAccumulators; ++i) sums[i] = broadcast(0.0f);
    for_each_vector(head_size, [&](int d, auto lanes) {
      Vec center = broadcast(0.0f);
      if constexpr (kWeighted) center = load(args.weighting->center + d, lanes);
      for (int i = 0; i < kRows; ++i) {
        Vec k = load_row(Element{}, row[i] + d * Element::kBytes, lanes);
        if constexpr (kWeighted) {
          k = k - center;
          sums[kRows + i] = multiply_add(k, k, sums[kRows + i]);
        }
        for (int h = 0; h < kHeads; ++h) {
          const Vec q = load(queries + h * head_size + d, lanes);
          sums[h * kRows + i] = multiply_add(k, q, sums[h * kRows + i]);
        }
      }
    });
    float totals[kAccumulators];
    sum_lanes_of_8(sums, totals);
    for (int h = 0; h < kHeads; ++h)
      memcpy(logits.dot[h] + r, totals + h * kRows, kRows * sizeof(float));
    if constexpr (kWeighted) memcpy(logits.centred_norm + r, totals + kRows, kRows * sizeof(float));
  }
}

/// By what logits are corrected: nothing, Weighting at the row's cosine, or AttendArgs::costs.
enum class RowWeights { none, by_cosine, given };

/// acc *= factor
inline void scale_vector(float* acc, int head_size, float factor) {
  for_each_vector(head_size, [&](int d, auto lanes) {
    store(acc + d, load(acc + d, lanes) * broadcast(factor), lanes);
  });
}

/// Turns one head's dot products into weights exp(logit - max), moving its sums along.
template <RowWeights kWeights>
inline void softmax_step(const AttendArgs& args, int head, int num_rows, Logits& logits,
                         [[maybe_unused]] const float* costs, float* dot) {
  Softmax& softmax = args.softmax[head];
  const size_t first = static_cast<size_t>(head) * args.head_size;
  Vec largest = broadcast(softmax.max);
  for (int i = 0; i < num_rows; i += kLanes) {
    Vec logit = load(dot + i);
    if constexpr (kWeights == RowWeights::by_cosine) {
      const Weighting& w = *args.weighting;
      const Vec norm = broadcast(w.query_norm) * square_root(load(logits.centred_norm + i));
      const Vec cosine = select(less(broadcast(0.0f), norm), logit / norm, broadcast(0.0f));
      const Vec log_u_of_row = log_inclusion(w, cosine);
      logit = multiply_add(logit + broadcast(w.query_dot_center), broadcast(args.scale),
                           broadcast(0.0f) - log_u_of_row);
    } else if constexpr (kWeights == RowWeights::given) {
      logit = multiply_add(logit, broadcast(args.scale), load(costs + i));
    } else {
      logit = logit * broadcast(args.scale);
    }
    // Lanes past the end hold anything; as -inf they weigh nothing.
    logit = select(first_lanes(num_rows - i), logit, broadcast(-__builtin_inff()));
    store(dot + i, logit);
    largest = maximum(logit, largest);
  }
  const float max = max_lane(largest);
  if (max > softmax.max) {
    float shrink[kLanes];
    store(shrink, exp_of_negative(broadcast(softmax.max) - broadcast(max)));
    softmax.max = max;
    softmax.sum *= shrink[0];
    scale_vector(args.acc + first, args.head_size, shrink[0]);
    if constexpr (kWeights == RowWeights::given) {
      if (args.errors != nullptr) {
        const float square = shrink[0] * shrink[0];
        args.errors[head].weight *= square;
        args.errors[head].square *= square;
        scale_vector(args.error_acc + first, args.head_size, square);
      }
    }
  }
  Vec sum = broadcast(0.0f);
  for (int i = 0; i < num_rows; i += kLanes) {
    const Vec weight = exp_of_negative(load(dot + i) - broadcast(max));
    store(dot + i, weight);
    sum = sum + weight;
  }
  softmax.sum += sum_lanes(sum);
}

/// acc += weights * V over kColumns vectors at a time; what is left goes on with half as many.
template <class Element, int kHeads, int kColumns>
inline void accumulate_values(const uint8_t* const* rows, int num_rows, const Logits& weights,
                              int head_size, int d, float* acc) {
  const size_t value_offset = static_cast<size_t>(head_size) * Element::kBytes;
  const auto add_columns = [&](auto lanes) {
    Vec sums[kHeads][kColumns];
    for (int h = 0; h < kHeads; ++h)
      for (int c = 0; c < kColumns; ++c)
        sums[h][c] = load(acc + h * head_size + d + c * kLanes, lanes);
    for (int r = 0; r < num_rows; ++r) {
      const uint8_t* value = rows[r] + value_offset + static_cast<size_t>(d) * Element::kBytes;
      for (int c = 0; c < kColumns; ++c) {
        const Vec v = load_row(Element{}, value + c * kLanes * Element::kBytes, lanes);
        for (int h = 0; h < kHeads; ++h)
          sums[h][c] = multiply_add(v, broadcast(weights.dot[h][r]), sums[h][c]);
      }
    }
    for (int h = 0; h < kHeads; ++h)
      for (int c = 0; c < kColumns; ++c)
        store(acc + h * head_size + d + c * kLanes, sums[h][c], lanes);
  };
  for (; d + kColumns * kLanes <= head_size; d += kColumns * kLanes) add_columns(AllLanes{});
  if constexpr (kColumns > 1)
    accumulate_values<Element, kHeads, kColumns / 2>(rows, num_rows, weights, head_size, d, acc);
  else if constexpr (kRaggedRows)
    if (d < head_size) add_columns(first_lanes(head_size - d));
}

/// What the error bars of all heads need of a tile's rows; 0 beyond the last.
struct RowErrors {
  float unlisted[kTileRows];  // 1 - u
  float square[kTileRows];    // |V|^2
};

template <class Element>
inline void row_errors(const AttendArgs& args, int first_row, int num_rows, RowErrors& errors) {
  for (int i = 0; i < num_rows; i += kLanes) {
    const Vec u = exp_of_negative(broadcast(0.0f) - load(args.costs + first_row + i));
    const Vec rest = broadcast(1.0f) - u;
    store(errors.unlisted + i, select(first_lanes(num_rows - i), rest, broadcast(0.0f)));
  }
  memset(errors.square, 0, sizeof errors.square);
  const size_t value_offset = static_cast<size_t>(args.head_size) * Element::kBytes;
  for (int r = 0; r < num_rows; r += kAccumulators) {
    Vec sums[kAccumulators];
    for (int i = 0; i < kAccumulators; ++i) {
      sums[i] = broadcast(0.0f);
      const uint8_t* value = args.rows[first_row + smaller(r + i, num_rows - 1)] + value_offset;
      for_each_vector(args.head_size, [&](int d, auto lanes) {
        const Vec v = load_row(Element{}, value + d * Element::kBytes, lanes);
        sums[i] = multiply_add(v, v, sums[i]);
      });
    }
    sum_lanes_of_8(sums, errors.square + r);
  }
}

/// Turns one head's weights into c, and adds up what needs no V.
inline void error_step(const RowErrors& rows, int num_rows, float* dot, ErrorSums& errors) {
  Vec weight = broadcast(0.0f), square = broadcast(0.0f);
  for (int i = 0; i < num_rows; i += kLanes) {
    const Vec share = load(dot + i);
    const Vec c = share * share * load(rows.unlisted + i);
    store(dot + i, c);
    weight = weight + c;
    square = multiply_add(c, load(rows.square + i), square);
  }
  errors.weight += sum_lanes(weight);
  errors.square += sum_lanes(square);
}

template <class Element, int kHeads, RowWeights kWeights>
inline void attend_tile(const AttendArgs& args, int head, int first_row, int num_rows,
                        [[maybe_unused]] const RowErrors& errors) {
  const uint8_t* const* rows = args.rows + first_row;
  Logits logits;
  const size_t first = static_cast<size_t>(head) * args.head_size;
  const float* costs = nullptr;
  if constexpr (kWeights == RowWeights::given) costs = args.costs + first_row;
  // The first heads bring the rows into L1; the others find them there.
  dot_products<Element, kHeads, kWeights == RowWeights::by_cosine>(
      args, args.queries + first, rows, num_rows, args.num_rows - first_row + args.num_rows_ahead,
      head == 0, logits);
  for (int h = 0; h < kHeads; ++h)
    softmax_step<kWeights>(args, head + h, num_rows, logits, costs, logits.dot[h]);
  accumulate_values<Element, kHeads, kAccumulators / kHeads>(rows, num_rows, logits, args.head_size,
                                                             0, args.acc + first);
  if constexpr (kWeights == RowWeights::given) {
    if (args.errors == nullptr) return;
    for (int h = 0; h < kHeads; ++h)
      error_step(errors, num_rows, logits.dot[h], args.errors[head + h]);
    accumulate_values<Element, kHeads, kAccumulators / kHeads>(
        rows, num_rows, logits, args.head_size, 0, args.error_acc + first);
  }
}

/// All heads over one tile of rows.
template <class Element, RowWeights kWeights>
inline void attend_heads(const AttendArgs& args, int first_row, int num_rows) {
  RowErrors errors;
  if constexpr (kWeights == RowWeights::given)
    if (args.errors != nullptr) row_errors<Element>(args, first_row, num_rows, errors);
  int head = 0;
  for (; head + 4 <= args.num_heads; head += 4)
    attend_tile<Element, 4, kWeights>(args, head, first_row, num_rows, errors);
  if (head + 2 <= args.num_heads) {
    attend_tile<Element, 2, kWeights>(args, head, first_row, num_rows, errors);
    head += 2;
  }
  if (head < args.num_heads)
    attend_tile<Element, 1, kWeights>(args, head, first_row, num_rows, errors);
}

template <class Element>
inline void attend_rows(const AttendArgs& args) {
  const size_t row_bytes = 2 * static_cast<size_t>(args.head_size) * Element::kBytes;
  // Those behind other rows were fetched with them.
  const int rows = args.num_rows + args.num_rows_ahead;
  const int not_yet = args.num_rows_fetched > 0 ? 0 : smaller(kRowsAhead, rows);
  for (int r = 0; r < not_yet; ++r) prefetch_lines(args.rows[r], row_bytes);
  for (int r = 0; r < args.num_rows; r += kTileRows) {
    const int num_rows = smaller(kTileRows, args.num_rows - r);
    if (args.weighting != nullptr)
      attend_heads<Element, RowWeights::by_cosine>(args, r, num_rows);
    else if (args.costs != nullptr)
      attend_heads<Element, RowWeights::given>(args, r, num_rows);
    else
      attend_heads<Element, RowWeights::none>(args, r, num_rows);
  }
}

void attend(const AttendArgs& args) {
  switch (args.row_type) {
    case RowType::float32:
      return attend_rows<Float32>(args);
    case RowType::bfloat16:
      return attend_rows<BFloat16>(args);
    case RowType::float16:
      return attend_rows<Float16>(args);
  }
}
