// The module vllm_magicpig._C, declared in _C.pyi. The table of contents is at the end; above it,
// each function checks its input and calls the C++ API. Nothing below this door checks again.
//
// pybind11 passes None as a null pointer, for shared_ptrs too, and as self of a member function:
// hence references, and none(false) where they cannot be.
#include "bindings.h"

#include <optional>
#include <thread>

namespace magicpig {
namespace {

/// Block tables and lengths; every block that a length needs is checked.
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

SampleRule rule_of(const LshIndex& index, const py::array& query_codes, int64_t num_reqs,
                   int64_t num_q_heads, int64_t min_matches, int64_t sink_tokens,
                   int64_t window_tokens) {
  const int64_t num_tables = index.pages().layout().num_tables;
  SampleRule rule;
  rule.index = &index;
  rule.query_codes =
      input<uint16_t>("query_codes", query_codes,
                      {{"num_reqs", num_reqs}, {"num_q_heads", num_q_heads}, {"L", num_tables}});
  check_query_codes(rule.query_codes, static_cast<size_t>(query_codes.size()), index.num_bits());
  rule.min_matches = in_range("min_matches", min_matches, 1, num_tables);
  rule.sink_tokens = token_count("sink_tokens", sink_tokens);
  rule.window_tokens = token_count("window_tokens", window_tokens);
  return rule;
}

// ------------------------------------------------------------------------------------- settings

constexpr int kMaxBits = 15;     // codes are uint16, and one more value means "no bucket"
constexpr int kMaxTables = 255;  // counters are uint8

Isa resolve_isa(const std::string& name) {
  if (name == "auto") return best_isa();
  std::string available;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (!isa_available(isa)) continue;
    if (name == isa_name(isa)) return isa;
    available += std::string(", ") + isa_name(isa);
  }
  refuse("isa is \"", name, "\", but this build and CPU have: auto", available,
         "; name one of them.");
}

std::unique_ptr<ThreadPool> make_pool(const std::vector<int>& cpus) {
  py::gil_scoped_release release;
  return std::make_unique<ThreadPool>(cpus);
}

PageLayout layout_of(const std::string& row_dtype, int64_t block_size, int64_t head_size,
                     int64_t num_tables) {
  PageLayout layout;
  if (row_dtype == "float32")
    layout.row_type = RowType::float32;
  else if (row_dtype == "bfloat16")
    layout.row_type = RowType::bfloat16;
  else if (row_dtype == "float16")
    layout.row_type = RowType::float16;
  else
    refuse("row_dtype is \"", row_dtype,
           "\", but must be \"float32\", \"bfloat16\" or \"float16\"; "
           "set the KV cache's dtype to one of them.");
  if (block_size < kTileTokens || block_size > kMaxSegmentTokens || block_size % kTileTokens != 0)
    refuse("block_size is ", block_size,
           ", but must be a multiple of 32 up to 65536; set "
           "--block-size to one.");
  if (head_size < 16 || head_size > 256 || head_size % 8 != 0)
    refuse("head_size is ", head_size,
           ", but must be a multiple of 8 in 16..256; use another "
           "backend for this model.");
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
    refuse("These pages have num_tables = 0, but this call needs codes; make them with L tables.");
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

std::unique_ptr<InclusionTable> make_table(int64_t num_bits, int64_t num_tables,
                                           int64_t min_matches) {
  const int bits = in_range("num_bits", num_bits, 1, kMaxBits);
  const int tables = in_range("num_tables", num_tables, 1, kMaxTables);
  const int matches = in_range("min_matches", min_matches, 1, tables);
  py::gil_scoped_release release;
  return std::make_unique<InclusionTable>(bits, tables, matches);
}

py::array_t<float> log_u_array(const InclusionTable& table, const py::array& cosine, Isa isa) {
  check_isa(isa);
  const float* x = input<float>("cosine", cosine, {{"n"}});
  py::array_t<float> out(cosine.shape(0));
  float* y = out.mutable_data();
  const size_t size = static_cast<size_t>(cosine.shape(0));
  py::gil_scoped_release release;
  log_u(table, x, size, y, isa);
  return out;
}

// ---------------------------------------------------------------------------------------- index

std::unique_ptr<BoundIndex> make_index(std::shared_ptr<BoundPages> pages, int64_t num_bits,
                                       int64_t segment_tokens) {
  check_has_codes(pages->pages);
  const int bits = in_range("num_bits", num_bits, 1, kMaxBits);
  const int block_size = pages->pages.layout().block_size;
  if (segment_tokens < block_size || segment_tokens > kMaxSegmentTokens ||
      segment_tokens % block_size != 0)
    refuse("segment_tokens is ", segment_tokens, ", but must be a multiple of the block size ",
           block_size, " up to 65536; pass one.");
  return std::make_unique<BoundIndex>(std::move(pages), bits, static_cast<int>(segment_tokens));
}

size_t seal(BoundIndex& self, const py::array& block_tables, const py::array& seq_lens,
            ThreadPool& pool) {
  const Requests requests = requests_of(self.pages->pages, block_tables, seq_lens);
  py::gil_scoped_release release;
  return self.index.seal(requests, pool);
}

size_t count_sealed(const BoundIndex& self, const py::array& block_table, int64_t num_tokens) {
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
  const auto found = self.index.find(blocks, tokens);
  return static_cast<size_t>(
      std::count_if(found.begin(), found.end(), [](const auto& s) { return s != nullptr; }));
}

// --------------------------------------------------------------------------------------- decode

std::vector<std::vector<py::array_t<int32_t>>> sample_arrays(
    const BoundIndex& index, const py::array& query_codes, const py::array& block_tables,
    const py::array& seq_lens, int64_t min_matches, int64_t sink_tokens, int64_t window_tokens,
    Isa isa, ThreadPool& pool) {
  check_isa(isa);
  const Requests requests = requests_of(index.pages->pages, block_tables, seq_lens);
  check_shape("query_codes", query_codes, {{"num_reqs"}, {"num_q_heads"}, {"L"}});
  const int num_q_heads = check_query_heads(query_codes.shape(1), index.pages->pages);
  const SampleRule rule = rule_of(index.index, query_codes, requests.size, num_q_heads, min_matches,
                                  sink_tokens, window_tokens);
  std::vector<std::vector<std::vector<int32_t>>> found;
  {
    py::gil_scoped_release release;
    found = sample(requests, num_q_heads, rule, isa, pool);
  }
  std::vector<std::vector<py::array_t<int32_t>>> arrays;
  for (const auto& heads : found) {
    arrays.emplace_back();
    for (const auto& ids : heads)
      arrays.back().emplace_back(static_cast<py::ssize_t>(ids.size()), ids.data());
  }
  return arrays;
}

py::tuple decode(const BoundPages& pages, const BoundIndex* index, const InclusionTable* table,
                 const py::array& query, const std::optional<py::array>& query_codes,
                 const std::optional<py::array>& center, const py::array& block_tables,
                 const py::array& seq_lens, py::array& out, py::array& lse, double scale,
                 int64_t min_matches, int64_t sink_tokens, int64_t window_tokens,
                 int64_t exact_below, Isa isa, ThreadPool& pool) {
  check_isa(isa);
  const Requests requests = requests_of(pages.pages, block_tables, seq_lens);
  const int head_size = pages.pages.layout().head_size;
  DecodeInput in = {};
  in.query = input<float>("query", query,
                          {{"num_reqs", requests.size}, {"num_q_heads"}, {"head_size", head_size}});
  in.num_q_heads = check_query_heads(query.shape(1), pages.pages);
  in.scale = finite_scale(scale);
  in.exact_below = token_count("exact_below", exact_below);

  const int given =
      (index != nullptr) + (table != nullptr) + query_codes.has_value() + center.has_value();
  if (given != 0 && given != 4)
    refuse("Of index, table, query_codes and center, ", given,
           " are given, but sampling needs all "
           "four and exact attention none; pass all or None.");
  in.sampled = given == 4;
  if (in.sampled) {
    check_same_pages(*index, pages);
    in.rule = rule_of(index->index, *query_codes, requests.size, in.num_q_heads, min_matches,
                      sink_tokens, window_tokens);
    check_table(*table, index->index, in.rule.min_matches);
    in.table = table;
    in.center =
        input<float>("center", *center,
                     {{"num_kv_heads", pages.pages.num_kv_heads()}, {"head_size", head_size}});
  }

  DecodeOutput result;
  result.out = output<float>(
      "out", out,
      {{"num_reqs", requests.size}, {"num_q_heads", in.num_q_heads}, {"head_size", head_size}});
  result.lse =
      output<float>("lse", lse, {{"num_reqs", requests.size}, {"num_q_heads", in.num_q_heads}});
  check_apart({"lse", lse}, {{"out", out}});
  for (const Named& written : {Named{"out", out}, Named{"lse", lse}}) {
    check_apart(written, {{"query", query},
                          {"block_tables", block_tables},
                          {"seq_lens", seq_lens},
                          {"the memory of the pages", pages.memory}});
    if (in.sampled) check_apart(written, {{"query_codes", *query_codes}, {"center", *center}});
  }
  py::array_t<int32_t> rows({requests.size, in.num_q_heads});
  result.sampled_rows = rows.mutable_data();
  {
    py::gil_scoped_release release;
    decode_attention(pages.pages, requests, in, result, isa, pool);
  }
  return py::make_tuple(rows, result.lookup_ns, result.attention_ns);
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
      .value("avx512", Isa::avx512);
  m.def("resolve_isa", &resolve_isa, arg("name"));

  py::class_<ThreadPool, std::shared_ptr<ThreadPool>>(m, "ThreadPool")
      .def(py::init(&make_pool), arg("cpus"))
      .def_property_readonly("num_threads", [](const ThreadPool& p) { return p.num_threads(); });

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
      .def("epoch", &epoch, arg("block"))
      .def("written_blocks", &written_blocks)
      .def_property_readonly("num_tokens", [](BoundPages& b) { return b.pages.num_tokens(); })
      .def_property_readonly("num_used_blocks",
                             [](BoundPages& b) { return b.pages.num_used_blocks(); });

  m.def("pack_codes", &pack_codes_array, array_arg("projections"), arg("num_bits"), arg("isa"),
        arg("pool"));

  py::class_<InclusionTable, std::shared_ptr<InclusionTable>>(m, "InclusionTable")
      .def(py::init(&make_table), arg("num_bits"), arg("num_tables"), arg("min_matches"))
      .def("log_u", &log_u_array, array_arg("cosine"), arg("isa"));

  py::class_<BoundIndex, std::shared_ptr<BoundIndex>>(m, "LshIndex")
      .def(py::init(&make_index), arg("pages").none(false), arg("num_bits"), arg("segment_tokens"))
      .def("seal", &seal, array_arg("block_tables"), array_arg("seq_lens"), arg("pool"))
      .def("count_sealed", &count_sealed, array_arg("block_table"), arg("num_tokens"))
      .def(
          "clear", [](BoundIndex& self) { self.index.clear(); },
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_segments", [](BoundIndex& b) { return b.index.num_segments(); })
      .def_property_readonly("num_bytes", [](BoundIndex& b) { return b.index.num_bytes(); })
      .def_property_readonly("segments_built",
                             [](BoundIndex& b) { return b.index.segments_built(); })
      .def_property_readonly("segments_dropped",
                             [](BoundIndex& b) { return b.index.segments_dropped(); });

  m.def("sample", &sample_arrays, arg("index"), array_arg("query_codes"), array_arg("block_tables"),
        array_arg("seq_lens"), py::kw_only(), arg("min_matches"), arg("sink_tokens"),
        arg("window_tokens"), arg("isa"), arg("pool"));

  m.def("decode_attention", &decode, arg("pages"), arg("index").none(true), arg("table").none(true),
        array_arg("query"), array_arg("query_codes").none(true), array_arg("center").none(true),
        array_arg("block_tables"), array_arg("seq_lens"), array_arg("out"), array_arg("lse"),
        py::kw_only(), arg("scale"), arg("min_matches"), arg("sink_tokens"), arg("window_tokens"),
        arg("exact_below"), arg("isa"), arg("pool"));

  bind_streams(m);

#if defined(MAGICPIG_SANITIZE)
  m.def("_make_error", &make_error, arg("kind"));
#endif
}

}  // namespace magicpig
