// The module vllm_magicpig._C, declared in _C.pyi. The table of contents is at the end; above it,
// each function checks its input and calls the C++ API. Nothing below this door checks again.
//
// pybind11 passes None as a null pointer, for shared_ptrs too, and as self of a member function:
// hence references, and none(false) where they cannot be.
#include "bindings.h"

#include <optional>
#include <thread>

#include "segment_memory.h"

namespace magicpig {

Requests requests_of(const Pages& pages, const py::array& block_tables, const py::array& seq_lens) {
  check_shape("block_tables", block_tables, {{"num_reqs"}, {"max_blocks"}});
  check_dtype<int32_t>("block_tables", block_tables);
  const py::ssize_t item = block_tables.itemsize();
  const bool rows_contiguous = block_tables.shape(1) <= 1 || block_tables.strides(1) == item;
  if (block_tables.size() > 0 && (!rows_contiguous || block_tables.strides(0) % item != 0))
    refuse("block_tables has strides of ", block_tables.strides(0), " and ",
           block_tables.strides(1), " bytes, but each row must be contiguous; copy it.");
  const int32_t* lens = input<int32_t>("seq_lens", seq_lens, {{"num_reqs", block_tables.shape(0)}});
  const Requests requests = {static_cast<const int32_t*>(block_tables.data()),
                             block_tables.size() > 0 ? block_tables.strides(0) / item : 0, lens,
                             in_range("num_reqs", block_tables.shape(0), 0, INT_MAX)};
  for (int r = 0; r < requests.size; ++r) {
    const int used = check_seq_len(pages, r, block_tables.shape(1), lens[r]);
    check_blocks(pages, r, requests.blocks(r), used, lens[r]);
  }
  return requests;
}

namespace {

// ------------------------------------------------------------------------------------- settings

constexpr int kMinBits = 2;
constexpr int kMaxBits = 15;  // codes are uint16, and one more value means "no bucket"

Isa resolve_isa(const std::string& name) {
  if (name == "auto") return best_isa();
  std::string available;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_vpopcnt}) {
    if (!isa_available(isa)) continue;
    if (name == isa_name(isa)) return isa;
    available += std::string(", ") + isa_name(isa);
  }
  refuse("isa is \"", name, "\", but this build and CPU have: auto", available,
         "; name one of them.");
}

std::unique_ptr<ThreadPool> make_pool(const std::vector<int>& cpus, int64_t spin_us) {
  constexpr int kLongestSpinUs = 10'000'000;
  const ThreadPool::Microseconds spin(in_range("spin_us", spin_us, 0, kLongestSpinUs));
  py::gil_scoped_release release;
  return std::make_unique<ThreadPool>(cpus, spin);
}

std::shared_ptr<ThreadPool> make_openmp_pool(int64_t num_threads) {
  return std::make_shared<ThreadPool>(in_range("num_threads", num_threads, 1, 4096));
}

PageLayout layout_of(const std::string& row_dtype, int64_t block_size, int64_t head_size,
                     int64_t num_tables) {
  PageLayout layout;
  layout.row_type = row_type_named(row_dtype);
  if (block_size < kTileTokens || block_size > kMaxSegmentTokens || block_size % kTileTokens != 0)
    refuse("block_size is ", block_size,
           ", but must be a multiple of 32 up to 65536; set "
           "--block-size to one.");
  check_head_size(head_size);
  layout.block_size = static_cast<int>(block_size);
  layout.head_size = static_cast<int>(head_size);
  layout.num_tables = in_range("num_tables", num_tables, 0, kMaxTables);
  return layout;
}

// ---------------------------------------------------------------------------------------- pages

std::shared_ptr<BoundPages> make_pages(py::array memory, const std::string& row_dtype,
                                       int64_t block_size, int64_t head_size, int64_t num_tables) {
  const PageLayout layout = layout_of(row_dtype, block_size, head_size, num_tables);
  uint8_t* bytes =
      output<uint8_t>("memory", memory, {{"num_blocks"}, {"num_kv_heads"}, {"chunk_bytes"}});
  const int64_t chunk_bytes = memory.shape(2);
  if (chunk_bytes < static_cast<int64_t>(layout.chunk_bytes()) || chunk_bytes % 2 != 0)
    refuse("memory has chunks of ", chunk_bytes,
           " bytes, but this layout needs an even number of "
           "at least ",
           layout.chunk_bytes(), "; size it with Pages.chunk_bytes.");
  if (reinterpret_cast<uintptr_t>(bytes) % 2 != 0)
    refuse("memory starts at the odd address ", static_cast<void*>(bytes),
           ", but codes are 2 bytes wide; align it.");
  const int num_blocks = in_range("num_blocks", memory.shape(0), 0, INT_MAX);
  const int num_kv_heads = in_range("num_kv_heads", memory.shape(1), 1, 4096);
  return std::shared_ptr<BoundPages>(new BoundPages{
      memory, Pages(bytes, num_blocks, num_kv_heads, static_cast<size_t>(chunk_bytes), layout)});
}

void store_rows(BoundPages& self, const py::array& key, const py::array& value,
                const py::array& slots, ThreadPool& pool) {
  const int64_t num_tokens = slots.ndim() == 1 ? slots.shape(0) : -1;
  const int64_t* slot = slots_of(slots, self.pages, num_tokens, -1);
  const RowsView keys = rows_view("key", key, self.pages, num_tokens);
  const RowsView values = rows_view("value", value, self.pages, num_tokens);
  check_apart({"memory", self.memory}, {{"key", key}, {"value", value}, {"slots", slots}});
  py::gil_scoped_release release;
  self.pages.store_rows(keys, values, slot, static_cast<size_t>(num_tokens), pool);
}

void note_writes(BoundPages& self, const py::array& slots) {
  const int64_t* slot = slots_of(slots, self.pages, -1, -1);
  py::gil_scoped_release release;
  self.pages.note_writes(slot, static_cast<size_t>(slots.shape(0)));
}

py::array_t<int32_t> written_blocks(const BoundPages& self) {
  std::vector<int32_t> blocks;
  for (int block = 0; block < self.pages.num_blocks(); ++block)
    if (self.pages.num_tokens(block) > 0) blocks.push_back(block);
  return py::array_t<int32_t>(static_cast<py::ssize_t>(blocks.size()), blocks.data());
}

void check_has_codes(const Pages& pages) {
  if (pages.layout().num_tables == 0)
    refuse("These pages have num_tables = 0, but this call needs codes; make them with tables.");
}

void store_codes(BoundPages& self, const py::array& codes, const py::array& slots,
                 ThreadPool& pool) {
  check_has_codes(self.pages);
  const int64_t num_tokens = slots.ndim() == 1 ? slots.shape(0) : -1;
  const int64_t* slot = slots_of(slots, self.pages, num_tokens, -1);
  const uint16_t* code = input<uint16_t>("codes", codes,
                                         {{"num_tokens", num_tokens},
                                          {"num_kv_heads", self.pages.num_kv_heads()},
                                          {"L", self.pages.layout().num_tables}});
  check_apart({"memory", self.memory}, {{"codes", codes}, {"slots", slots}});
  py::gil_scoped_release release;
  self.pages.store_codes(code, slot, static_cast<size_t>(num_tokens), pool);
}

py::array_t<uint16_t> load_codes(const BoundPages& self, const py::array& slots) {
  check_has_codes(self.pages);
  const int64_t* slot = slots_of(slots, self.pages, -1, 0);
  py::array_t<uint16_t> codes(std::vector<py::ssize_t>{slots.shape(0), self.pages.num_kv_heads(),
                                                       self.pages.layout().num_tables});
  uint16_t* code = codes.mutable_data();
  const size_t num_tokens = static_cast<size_t>(slots.shape(0));
  py::gil_scoped_release release;
  self.pages.load_codes(slot, num_tokens, code);
  return codes;
}

uint64_t epoch(const BoundPages& self, int64_t block) {
  return self.pages.epoch(in_range("block", block, 0, self.pages.num_blocks() - 1));
}

// ------------------------------------------------------------------------- codes and probability

py::array_t<uint16_t> pack_codes_array(const py::array& projections, int64_t num_bits, Isa isa,
                                       ThreadPool& pool) {
  check_isa(isa);
  const int bits = in_range("num_bits", num_bits, 1, kMaxBits);
  const float* x = input<float>("projections", projections, {{"n"}, {"L * K"}});
  if (projections.shape(1) % bits != 0)
    refuse("projections has ", projections.shape(1), " columns, but K = ", bits,
           " must divide them; pass L * K columns.");
  const int num_tables = in_range("num_tables", projections.shape(1) / bits, 1, kMaxTables);
  const size_t num_rows = static_cast<size_t>(projections.shape(0));
  py::array_t<uint16_t> codes({projections.shape(0), static_cast<py::ssize_t>(num_tables)});
  uint16_t* out = codes.mutable_data();
  py::gil_scoped_release release;
  pack_codes(x, num_rows, num_tables, bits, out, isa, pool);
  return codes;
}

std::unique_ptr<SimHash> make_hash(const py::array& signs, int64_t head_size, int64_t num_bits,
                                   int64_t num_tables) {
  const int bits = in_range("num_bits", num_bits, kMinBits, kMaxBits);
  const int tables = in_range("num_tables", num_tables, 1, kMaxTables);
  check_shape("signs", signs, {{"3 + blocks"}, {"size"}});
  const int64_t size = signs.shape(1);
  if (size < 1 || size > SimHash::kMaxSize || (size & (size - 1)) != 0)
    refuse("signs are for a transform of ", size,
           " elements, but must be for a power of two up to ", SimHash::kMaxSize,
           "; pass those of reference.hadamard_signs.");
  const int head = in_range("head_size", head_size, 1, size);
  const int blocks = SimHash::num_blocks(bits, tables, static_cast<int>(size));
  const int8_t* sign = input<int8_t>("signs", signs, {{"3 + blocks", 3 + blocks}, {"size", size}});
  for (py::ssize_t i = 0; i < signs.size(); ++i)
    if (sign[i] != 1 && sign[i] != -1)
      refuse("signs holds ", static_cast<int>(sign[i]), ", but must hold 1 and -1; pass signs.");
  return std::make_unique<SimHash>(head, bits, tables, static_cast<int>(size),
                                   std::vector<float>(sign, sign + signs.size()));
}

py::array_t<uint16_t> hash_codes(const SimHash& self, const py::array& vectors,
                                 const std::optional<py::array>& center, Isa isa,
                                 ThreadPool& pool) {
  check_isa(isa);
  const float* x =
      input<float>("vectors", vectors, {{"n"}, {"num_heads"}, {"head_size", self.head_size()}});
  const py::ssize_t num_heads = vectors.shape(1);
  const float* centers =
      center.has_value() ? input<float>("center", *center,
                                        {{"num_heads", num_heads}, {"head_size", self.head_size()}})
                         : nullptr;
  py::array_t<uint16_t> codes(
      std::vector<py::ssize_t>{vectors.shape(0), num_heads, self.num_tables()});
  uint16_t* out = codes.mutable_data();
  const size_t num_vectors = static_cast<size_t>(vectors.shape(0) * num_heads);
  py::gil_scoped_release release;
  if (num_vectors > 0)
    self.hash(x, num_vectors, centers, static_cast<size_t>(num_heads), out, isa, pool);
  return codes;
}

std::unique_ptr<InclusionTable> make_table(int64_t num_bits, int64_t num_tables) {
  const int bits = in_range("num_bits", num_bits, kMinBits, kMaxBits);
  const int tables = in_range("num_tables", num_tables, 1, kMaxTables);
  py::gil_scoped_release release;
  return std::make_unique<InclusionTable>(bits, tables);
}

int check_matches(const InclusionTable& table, int64_t min_matches) {
  return in_range("min_matches", min_matches, 1, table.num_tables());
}

py::array_t<float> log_u_array(const InclusionTable& table, const py::array& cosine,
                               int64_t min_matches, double fraction, Isa isa) {
  check_isa(isa);
  const float* x = input<float>("cosine", cosine, {{"n"}});
  if (!(fraction > 0 && fraction <= 1))
    refuse("fraction is ", fraction,
           ", but must lie above 0 and at most at 1; pass one that does.");
  const Threshold threshold = {check_matches(table, min_matches), static_cast<float>(fraction)};
  py::array_t<float> out(cosine.shape(0));
  float* y = out.mutable_data();
  const size_t size = static_cast<size_t>(cosine.shape(0));
  py::gil_scoped_release release;
  log_u(table, threshold, x, size, y, isa);
  return out;
}

std::unique_ptr<BoundRule> make_rule(std::shared_ptr<InclusionTable> table, int64_t min_matches,
                                     int64_t sink_tokens, int64_t window_tokens, double row_budget,
                                     uint64_t seed) {
  if (!(row_budget >= 0 && row_budget <= 1))
    refuse("row_budget is ", row_budget,
           ", but is a fraction of the middle; pass one in 0..1, 0 for no limit.");
  SampleRule rule;
  rule.table = table.get();
  rule.min_matches = check_matches(*table, min_matches);
  rule.sink_tokens = token_count("sink_tokens", sink_tokens);
  rule.window_tokens = token_count("window_tokens", window_tokens);
  rule.row_budget = row_budget;
  rule.seed = seed;
  return std::unique_ptr<BoundRule>(new BoundRule{std::move(table), rule});
}

// ---------------------------------------------------------------------------------------- index

std::unique_ptr<BoundIndex> make_index(std::shared_ptr<BoundPages> pages, int64_t num_bits,
                                       const std::vector<int64_t>& levels, int64_t max_bytes) {
  check_has_codes(pages->pages);
  const int bits = in_range("num_bits", num_bits, kMinBits, kMaxBits);
  if (levels.empty()) refuse("levels is empty, but an index needs a segment size; name one.");
  int64_t unit = pages->pages.layout().block_size;
  const char* unit_name = "the block size ";
  std::vector<int> tokens;
  for (int64_t level : levels) {
    if (level < unit || level > kMaxSegmentTokens || level % unit != 0 ||
        (!tokens.empty() && level == unit))
      refuse("levels[", tokens.size(), "] is ", level, ", but must be a multiple of ", unit_name,
             unit,
             tokens.empty() ? " up to 65536; pass one." : ", above it and up to 65536; pass one.");
    tokens.push_back(static_cast<int>(level));
    unit = level;
    unit_name = "the level before it, ";
  }
  if (max_bytes < 0)
    refuse("max_bytes is ", max_bytes, ", but must be 0 (no limit) or more; pass a size in bytes.");
  return std::make_unique<BoundIndex>(std::move(pages), bits, std::move(tokens),
                                      static_cast<size_t>(max_bytes));
}

size_t seal(BoundIndex& self, const py::array& block_tables, const py::array& seq_lens,
            ThreadPool& pool) {
  const Requests requests = requests_of(self.pages->pages, block_tables, seq_lens);
  py::gil_scoped_release release;
  return self.index.seal(requests, pool);
}

std::vector<std::vector<int32_t>> missing(const BoundIndex& self, const py::array& block_tables,
                                          const py::array& seq_lens) {
  const Requests requests = requests_of(self.pages->pages, block_tables, seq_lens);
  py::gil_scoped_release release;
  std::vector<std::vector<int32_t>> stretches;
  for (const LshIndex::Stretch& stretch : self.index.missing(requests)) {
    stretches.emplace_back();
    for (const Segment::Source& source : stretch) stretches.back().push_back(source.block);
  }
  return stretches;
}

std::vector<std::pair<int, int>> find(const BoundIndex& self, const py::array& block_table,
                                      int64_t num_tokens) {
  const Pages& pages = self.pages->pages;
  const int32_t* blocks = input<int32_t>("block_table", block_table, {{"n"}});
  const int64_t block_size = pages.layout().block_size;
  const int tokens =
      in_range("num_tokens", num_tokens, 0, token_capacity(block_table.shape(0), block_size));
  for (int64_t i = 0; i < (tokens + block_size - 1) / block_size; ++i)
    if (blocks[i] < 0 || blocks[i] >= pages.num_blocks())
      refuse("block_table[", i, "] is ", blocks[i], ", but blocks lie in 0..",
             pages.num_blocks() - 1, "; pass the blocks that hold the tokens.");
  py::gil_scoped_release release;
  std::vector<std::pair<int, int>> ranges;
  for (const LshIndex::Found& found : self.index.find(blocks, tokens))
    ranges.emplace_back(found.begin, found.end());
  return ranges;
}

#if defined(MAGICPIG_SANITIZE)
/// An error on purpose, in sanitized builds alone: scripts/sanitize.py sees it reported before it
/// believes that silence means anything.
int make_error(const std::string& kind) {
  const std::unique_ptr<volatile int[]> values(new volatile int[4]());
  if (kind == "address") return values[4 + values[0]];
  if (kind == "undefined") return INT_MAX - values[0] + (values[1] + 1);
  if (kind == "thread") {
    std::thread other([&] { values[0] = values[0] + 1; });
    values[0] = values[0] + 1;
    other.join();
  }
  return values[0];
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  using py::arg;

  py::enum_<Isa>(m, "Isa")
      .value("portable", Isa::portable)
      .value("avx2", Isa::avx2)
      .value("avx512", Isa::avx512)
      .value("avx512_vpopcnt", Isa::avx512_vpopcnt);
  m.def("resolve_isa", &resolve_isa, arg("name"));

  py::class_<ThreadPool, std::shared_ptr<ThreadPool>>(m, "ThreadPool")
      .def(py::init(&make_pool), arg("cpus"), arg("spin_us") = ThreadPool::kSpin.count())
      .def_static("of_openmp", &make_openmp_pool, arg("num_threads"))
      .def_property_readonly("num_threads", [](const ThreadPool& p) { return p.num_threads(); })
      .def_property_readonly("spin_us", [](const ThreadPool& p) { return p.spin().count(); })
      .def_property_readonly("num_sleeping", [](const ThreadPool& p) { return p.num_sleeping(); })
      .def_property_readonly("num_wakes", [](const ThreadPool& p) { return p.num_wakes(); });

  py::class_<BoundPages, std::shared_ptr<BoundPages>>(m, "Pages")
      .def(py::init(&make_pages), array_arg("memory"), arg("row_dtype"), arg("block_size"),
           arg("head_size"), arg("num_tables"))
      .def_static(
          "chunk_bytes",
          [](const std::string& row_dtype, int64_t block_size, int64_t head_size,
             int64_t num_tables) {
            return layout_of(row_dtype, block_size, head_size, num_tables).chunk_bytes();
          },
          arg("row_dtype"), arg("block_size"), arg("head_size"), arg("num_tables"))
      .def("store_rows", &store_rows, array_arg("key"), array_arg("value"), array_arg("slots"),
           arg("pool"))
      .def("store_codes", &store_codes, array_arg("codes"), array_arg("slots"), arg("pool"))
      .def("load_codes", &load_codes, array_arg("slots"))
      .def("note_writes", &note_writes, array_arg("slots"))
      .def("forget", [](BoundPages& self) { self.pages.forget(); })
      .def("epoch", &epoch, arg("block"))
      .def("written_blocks", &written_blocks)
      .def_property_readonly("num_tokens", [](BoundPages& b) { return b.pages.num_tokens(); })
      .def_property_readonly("num_used_blocks",
                             [](BoundPages& b) { return b.pages.num_used_blocks(); });

  m.def("pack_codes", &pack_codes_array, array_arg("projections"), arg("num_bits"), arg("isa"),
        arg("pool"));

  py::class_<SimHash, std::shared_ptr<SimHash>>(m, "SimHash")
      .def(py::init(&make_hash), array_arg("signs"), arg("head_size"), arg("num_bits"),
           arg("num_tables"))
      .def("hash", &hash_codes, array_arg("vectors"), array_arg("center").none(true), arg("isa"),
           arg("pool"));

  py::class_<InclusionTable, std::shared_ptr<InclusionTable>>(m, "InclusionTable")
      .def(py::init(&make_table), arg("num_bits"), arg("num_tables"))
      .def("log_u", &log_u_array, array_arg("cosine"), arg("min_matches"), arg("fraction"),
           arg("isa"));

  py::class_<BoundRule, std::shared_ptr<BoundRule>>(m, "SampleRule")
      .def(py::init(&make_rule), arg("table").none(false), py::kw_only(), arg("min_matches"),
           arg("sink_tokens"), arg("window_tokens"), arg("row_budget") = 0.0, arg("seed") = 0);

  py::class_<BoundIndex, std::shared_ptr<BoundIndex>>(m, "LshIndex")
      .def(py::init(&make_index), arg("pages").none(false), arg("num_bits"), arg("levels"),
           arg("max_bytes") = 0)
      .def("seal", &seal, array_arg("block_tables"), array_arg("seq_lens"), arg("pool"))
      .def("missing", &missing, array_arg("block_tables"), array_arg("seq_lens"))
      .def("find", &find, array_arg("block_table"), arg("num_tokens"))
      .def(
          "clear", [](BoundIndex& self) { self.index.clear(); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "forget", [](BoundIndex& self) { self.index.forget(); },
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("changes", [](BoundIndex& b) { return b.index.changes(); })
      .def_property_readonly("max_bytes", [](BoundIndex& b) { return b.index.max_bytes(); })
      .def_property_readonly("num_segments", [](BoundIndex& b) { return b.index.num_segments(); })
      .def_property_readonly("num_bytes", [](BoundIndex& b) { return b.index.num_bytes(); })
      .def_property_readonly("segments_built",
                             [](BoundIndex& b) { return b.index.segments_built(); })
      .def_property_readonly("segments_dropped",
                             [](BoundIndex& b) { return b.index.segments_dropped(); })
      .def_property_readonly("builds_refused",
                             [](BoundIndex& b) { return b.index.builds_refused(); });

  m.def("idle_segment_bytes", &idle_segment_bytes);
  bind_signatures(m);
  bind_decode(m);
  bind_streams(m);

#if defined(MAGICPIG_SANITIZE)
  m.def("_make_error", &make_error, arg("kind"));
#endif
}

}  // namespace magicpig
