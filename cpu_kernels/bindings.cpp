// The module vllm_magicpig._C, declared in _C.pyi. The table of contents is at the end; above it,
// each function checks its input and calls the C++ API. Nothing below this door checks again.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <optional>
#include <sstream>
#include <string>

#include "magicpig.h"

namespace py = pybind11;

namespace magicpig {
namespace {

// ------------------------------------------------------------------------------------- refusals

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw py::value_error(sentence.str());
}

int in_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    refuse(name, " is ", value, ", but must lie in ", low, "..", high, "; pass one that does.");
  return static_cast<int>(value);
}

/// A number of tokens; beyond INT_MAX none is told apart.
int token_count(const char* name, int64_t value) {
  if (value < 0) refuse(name, " is ", value, ", but is a number of tokens; pass 0 or more.");
  return static_cast<int>(std::min<int64_t>(value, INT_MAX));
}

void check_isa(Isa isa) {
  if (!isa_available(isa))
    refuse("isa is ", isa_name(isa),
           ", which this build or this CPU lacks; use resolve_isa(\"auto\")"
           " or \"portable\".");
}

// --------------------------------------------------------------------------------------- arrays

/// One dimension of a shape: its name, and its size where that is given.
struct Dim {
  const char* name;
  int64_t size = -1;
};

std::string shape_text(const py::array& array) {
  std::ostringstream text;
  text << '(';
  for (py::ssize_t i = 0; i < array.ndim(); ++i) text << (i ? ", " : "") << array.shape(i);
  text << ')';
  return text.str();
}

void check_shape(const char* name, const py::array& array, std::initializer_list<Dim> dims) {
  const bool fits =
      std::equal(dims.begin(), dims.end(), array.shape(), array.shape() + array.ndim(),
                 [](const Dim& dim, py::ssize_t size) { return dim.size < 0 || dim.size == size; });
  if (fits) return;
  std::ostringstream wanted;
  const char* comma = "";
  for (const Dim& dim : dims) {
    wanted << comma << dim.name;
    if (dim.size >= 0) wanted << " = " << dim.size;
    comma = ", ";
  }
  refuse(name, " has shape ", shape_text(array), ", but [", wanted.str(),
         "] is needed; reshape it.");
}

template <class T>
void check_dtype(const char* name, const py::array& array) {
  if (!py::isinstance<py::array_t<T>>(array))
    refuse(name, " is ", py::cast<std::string>(py::str(array.dtype())), ", but ",
           py::cast<std::string>(py::str(py::dtype::of<T>())), " is needed; convert it.");
  if (!(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_))
    refuse(name, " is not aligned to its ", sizeof(T), "-byte elements; copy it.");
}

template <class T>
const T* input(const char* name, const py::array& array, std::initializer_list<Dim> dims) {
  check_shape(name, array, dims);
  check_dtype<T>(name, array);
  if (!(array.flags() & py::array::c_style))
    refuse(name, " of shape ", shape_text(array),
           " is not C-contiguous, but is read as one run of memory; use np.ascontiguousarray.");
  return static_cast<const T*>(array.data());
}

template <class T>
T* output(const char* name, py::array& array, std::initializer_list<Dim> dims) {
  input<T>(name, array, dims);
  if (!array.writeable())
    refuse(name, " of shape ", shape_text(array),
           " is read-only, but is written; pass a writable "
           "array.");
  return static_cast<T*>(array.mutable_data());
}

/// Rows of a caller, in any strides but with whole rows contiguous.
RowsView rows_view(const char* name, const py::array& array, const Pages& pages,
                   int64_t num_tokens) {
  check_shape(name, array,
              {{"num_tokens", num_tokens},
               {"num_kv_heads", pages.num_kv_heads()},
               {"head_size", pages.layout().head_size}});
  if (pages.layout().row_type == RowType::float32)
    check_dtype<float>(name, array);
  else
    check_dtype<uint16_t>(name, array);
  if (array.size() > 0 && array.shape(2) > 1 && array.strides(2) != array.itemsize())
    refuse(name, " has a stride of ", array.strides(2),
           " bytes in its last dimension, but rows must "
           "be contiguous (",
           array.itemsize(), "); copy it.");
  return {static_cast<const uint8_t*>(array.data()), array.strides(0), array.strides(1)};
}

const int64_t* slots_of(const py::array& slots, const Pages& pages, int64_t num_tokens,
                        int64_t lowest) {
  const int64_t* slot = input<int64_t>("slots", slots, {{"num_tokens", num_tokens}});
  const int64_t end = static_cast<int64_t>(pages.num_blocks()) * pages.layout().block_size;
  for (py::ssize_t i = 0; i < slots.size(); ++i)
    if (slot[i] < lowest || slot[i] >= end)
      refuse("slots[", i, "] is ", slot[i], ", but slots lie in ", lowest, "..", end - 1,
             "; pass slots of this layer's ", pages.num_blocks(), " blocks.");
  return slot;
}

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
                             block_tables.strides(0) / item, lens,
                             in_range("num_reqs", block_tables.shape(0), 0, INT_MAX)};
  const int64_t block_size = pages.layout().block_size;
  for (int r = 0; r < requests.size; ++r) {
    const int64_t capacity = block_tables.shape(1) * block_size;
    if (lens[r] < 0 || lens[r] > capacity)
      refuse("seq_lens[", r, "] is ", lens[r], ", but lies in 0..", capacity, " with ",
             block_tables.shape(1), " blocks of ", block_size, "; pass wider block_tables.");
    const int64_t used = (lens[r] + block_size - 1) / block_size;
    for (int64_t i = 0; i < used; ++i)
      if (requests.blocks(r)[i] < 0 || requests.blocks(r)[i] >= pages.num_blocks())
        refuse("block_tables[", r, ", ", i, "] is ", requests.blocks(r)[i],
               ", but blocks lie in 0..", pages.num_blocks() - 1,
               "; pass the blocks that hold the request's ", lens[r], " tokens.");
  }
  return requests;
}

int check_query_heads(int64_t num_q_heads, const Pages& pages) {
  const int64_t heads = pages.num_kv_heads();
  if (num_q_heads < heads || num_q_heads % heads != 0 || num_q_heads / heads > 64)
    refuse("num_q_heads is ", num_q_heads, ", but must be 1..64 times the pages' ", heads,
           " kv heads; pass the query of this layer.");
  return static_cast<int>(num_q_heads);
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
  const uint16_t* end = rule.query_codes + query_codes.size();
  const uint16_t* largest = std::max_element(rule.query_codes, end);
  if (largest != end && *largest >> index.num_bits() != 0)
    refuse("query_codes holds ", *largest, ", but codes of ", index.num_bits(), " bits lie in 0..",
           (1 << index.num_bits()) - 1, "; hash with the index's K.");
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

/// The pages, and the array whose memory they are.
struct BoundPages {
  py::array memory;
  Pages pages;
};

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
  py::gil_scoped_release release;
  self.pages.store_rows(keys, values, slot, static_cast<size_t>(num_tokens), pool);
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

/// The index, and the pages that it reads.
struct BoundIndex {
  std::shared_ptr<BoundPages> pages;
  LshIndex index;

  BoundIndex(std::shared_ptr<BoundPages> pages_, int num_bits, int segment_tokens)
      : pages(std::move(pages_)), index(pages->pages, num_bits, segment_tokens) {}
};

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
  const int tokens = in_range("num_tokens", num_tokens, 0, block_table.shape(0) * block_size);
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
  if (!std::isfinite(scale))
    refuse("scale is ", scale, ", but must be finite; pass the model's softmax scale.");
  in.scale = static_cast<float>(scale);
  in.exact_below = token_count("exact_below", exact_below);

  const int given =
      (index != nullptr) + (table != nullptr) + query_codes.has_value() + center.has_value();
  if (given != 0 && given != 4)
    refuse("Of index, table, query_codes and center, ", given,
           " are given, but sampling needs all "
           "four and exact attention none; pass all or None.");
  in.sampled = given == 4;
  if (in.sampled) {
    if (index->pages.get() != &pages)
      refuse("index belongs to other pages; pass the index made from these.");
    in.rule = rule_of(index->index, *query_codes, requests.size, in.num_q_heads, min_matches,
                      sink_tokens, window_tokens);
    if (table->num_bits != index->index.num_bits() ||
        table->num_tables != pages.pages.layout().num_tables ||
        table->min_matches != in.rule.min_matches)
      refuse("table is for (K, L, min_matches) = (", table->num_bits, ", ", table->num_tables, ", ",
             table->min_matches, "), but this call is for (", index->index.num_bits(), ", ",
             pages.pages.layout().num_tables, ", ", in.rule.min_matches,
             "); make an InclusionTable for it.");
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
  py::array_t<int32_t> rows({requests.size, in.num_q_heads});
  result.sampled_rows = rows.mutable_data();
  {
    py::gil_scoped_release release;
    decode_attention(pages.pages, requests, in, result, isa, pool);
  }
  return py::make_tuple(rows, result.lookup_ns, result.attention_ns);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using py::arg;
  const auto array = [](const char* name) { return py::arg(name).noconvert(); };

  py::enum_<Isa>(m, "Isa")
      .value("portable", Isa::portable)
      .value("avx2", Isa::avx2)
      .value("avx512", Isa::avx512);
  m.def("resolve_isa", &resolve_isa, arg("name"));

  py::class_<ThreadPool>(m, "ThreadPool")
      .def(py::init(&make_pool), arg("cpus"))
      .def_property_readonly("num_threads", &ThreadPool::num_threads);

  py::class_<BoundPages, std::shared_ptr<BoundPages>>(m, "Pages")
      .def(py::init(&make_pages), array("memory"), arg("row_dtype"), arg("block_size"),
           arg("head_size"), arg("num_tables"))
      .def_static(
          "chunk_bytes",
          [](const std::string& row_dtype, int64_t block_size, int64_t head_size,
             int64_t num_tables) {
            return layout_of(row_dtype, block_size, head_size, num_tables).chunk_bytes();
          },
          arg("row_dtype"), arg("block_size"), arg("head_size"), arg("num_tables"))
      .def("store_rows", &store_rows, array("key"), array("value"), array("slots"), arg("pool"))
      .def("store_codes", &store_codes, array("codes"), array("slots"), arg("pool"))
      .def("load_codes", &load_codes, array("slots"))
      .def("epoch", &epoch, arg("block"));

  m.def("pack_codes", &pack_codes_array, array("projections"), arg("num_bits"), arg("isa"),
        arg("pool"));

  py::class_<InclusionTable>(m, "InclusionTable")
      .def(py::init(&make_table), arg("num_bits"), arg("num_tables"), arg("min_matches"))
      .def("log_u", &log_u_array, array("cosine"), arg("isa"));

  py::class_<BoundIndex>(m, "LshIndex")
      .def(py::init(&make_index), arg("pages"), arg("num_bits"), arg("segment_tokens"))
      .def("seal", &seal, array("block_tables"), array("seq_lens"), arg("pool"))
      .def("count_sealed", &count_sealed, array("block_table"), arg("num_tokens"))
      .def(
          "clear", [](BoundIndex& self) { self.index.clear(); },
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_segments", [](BoundIndex& b) { return b.index.num_segments(); })
      .def_property_readonly("num_bytes", [](BoundIndex& b) { return b.index.num_bytes(); })
      .def_property_readonly("segments_built",
                             [](BoundIndex& b) { return b.index.segments_built(); })
      .def_property_readonly("segments_dropped",
                             [](BoundIndex& b) { return b.index.segments_dropped(); });

  m.def("sample", &sample_arrays, arg("index"), array("query_codes"), array("block_tables"),
        array("seq_lens"), py::kw_only(), arg("min_matches"), arg("sink_tokens"),
        arg("window_tokens"), arg("isa"), arg("pool"));

  m.def("decode_attention", &decode, arg("pages"), arg("index").none(true), arg("table").none(true),
        array("query"), array("query_codes").none(true), array("center").none(true),
        array("block_tables"), array("seq_lens"), array("out"), array("lse"), py::kw_only(),
        arg("scale"), arg("min_matches"), arg("sink_tokens"), arg("window_tokens"),
        arg("exact_below"), arg("isa"), arg("pool"));
}

}  // namespace magicpig
