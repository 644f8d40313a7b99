// The part of vllm_magicpig._C for decode steps in the caller's time: a layer, and what a step asks
// of all layers. What a layer or a step is made of is checked then, so that a call has little left
// to do: where the caches are cold, checking all of it takes as long as the lookup.
#include <optional>

#include "bindings.h"
#include "bindings_rows.h"
#include "timing.h"

namespace magicpig {
namespace {

/// Query codes of a batch, none of more bits than the rule's.
const uint16_t* query_codes_of(const SampleRule& rule, const py::array& query_codes,
                               int64_t num_reqs, int64_t num_q_heads) {
  const uint16_t* codes = input<uint16_t>(
      "query_codes", query_codes,
      {{"num_reqs", num_reqs}, {"num_q_heads", num_q_heads}, {"L", rule.table->num_tables()}});
  check_query_codes(codes, static_cast<size_t>(query_codes.size()), rule.table->num_bits());
  return codes;
}

/// That the hash makes the codes of these pages and of the rule.
void check_hash(const SimHash& hash, const SampleRule& rule, const Pages& pages) {
  const InclusionTable& table = *rule.table;
  if (hash.head_size() != pages.layout().head_size || hash.num_tables() != table.num_tables() ||
      hash.num_bits() != table.num_bits())
    refuse("hasher is for vectors of ", hash.head_size(), " elements and ", hash.num_tables(),
           " tables of ", hash.num_bits(), " bits, but ", pages.layout().head_size, " elements, ",
           table.num_tables(), " tables and ", table.num_bits(),
           " bits are needed; pass the hash of these keys.");
}

/// Per request and query head (positions, matches of the threshold, fraction).
std::vector<std::vector<py::tuple>> sample_arrays(const BoundPages& pages, const BoundRule& rule,
                                                  const BoundIndex* index,
                                                  const py::array& query_codes,
                                                  const py::array& block_tables,
                                                  const py::array& seq_lens, Isa isa,
                                                  ThreadPool& pool) {
  check_isa(isa);
  const Requests requests = requests_of(pages.pages, block_tables, seq_lens);
  check_shape("query_codes", query_codes, {{"num_reqs"}, {"num_q_heads"}, {"L"}});
  const int num_q_heads = check_query_heads(query_codes.shape(1), pages.pages);
  check_sampling(&rule, index, pages);
  const SampleInput in = {&rule.rule, index == nullptr ? nullptr : &index->index,
                          query_codes_of(rule.rule, query_codes, requests.size, num_q_heads)};
  std::vector<std::vector<HeadSample>> samples;
  {
    py::gil_scoped_release release;
    samples = sample(pages.pages, requests, num_q_heads, in, isa, pool);
  }
  std::vector<std::vector<py::tuple>> arrays;
  for (const auto& heads : samples) {
    arrays.emplace_back();
    for (const HeadSample& head : heads)
      arrays.back().push_back(
          py::make_tuple(py::array_t<int32_t>(static_cast<py::ssize_t>(head.positions.size()),
                                              head.positions.data()),
                         head.threshold.matches, head.threshold.fraction));
  }
  return arrays;
}

// ----------------------------------------------------------------------------------------- batch

/// A step's decodes, copied; checked for pages of so many blocks.
struct BoundBatch {
  std::vector<int32_t> tables;
  std::vector<int32_t> seq_lens;
  std::vector<int64_t> tokens;  // empty: the requests' numbers
  ptrdiff_t max_blocks;
  int64_t num_tokens;  // rows that query and out need
  int num_blocks;
  int block_size;

  Requests requests() const {
    return {tables.data(), max_blocks, seq_lens.data(), static_cast<int>(seq_lens.size())};
  }
};

std::vector<int64_t> tokens_of(const py::array& tokens, int64_t num_reqs) {
  const int64_t* token = input<int64_t>("tokens", tokens, {{"num_reqs", num_reqs}});
  for (int64_t i = 0; i < num_reqs; ++i)
    if (token[i] < (i == 0 ? 0 : token[i - 1] + 1) || token[i] >= INT_MAX)
      refuse("tokens[", i, "] is ", token[i],
             ", but tokens are rows of the query, ascending, each of one request; sort them.");
  return {token, token + num_reqs};
}

std::unique_ptr<BoundBatch> make_batch(const BoundPages& pages, const py::array& block_tables,
                                       const py::array& seq_lens,
                                       const std::optional<py::array>& tokens) {
  const Requests given = requests_of(pages.pages, block_tables, seq_lens);
  auto batch = std::make_unique<BoundBatch>();
  batch->num_blocks = pages.pages.num_blocks();
  batch->block_size = pages.pages.layout().block_size;
  batch->seq_lens.assign(given.seq_lens, given.seq_lens + given.size);
  const auto num_used = [&](int r) {
    return (static_cast<int64_t>(given.seq_lens[r]) + batch->block_size - 1) / batch->block_size;
  };
  for (int r = 0; r < given.size; ++r)
    batch->max_blocks = std::max<ptrdiff_t>(batch->max_blocks, num_used(r));
  batch->tables.resize(static_cast<size_t>(given.size) * static_cast<size_t>(batch->max_blocks));
  for (int r = 0; r < given.size; ++r)
    std::copy_n(given.blocks(r), num_used(r), batch->tables.begin() + r * batch->max_blocks);
  batch->num_tokens = given.size;
  if (tokens.has_value()) {
    batch->tokens = tokens_of(*tokens, given.size);
    batch->num_tokens = batch->tokens.empty() ? 0 : batch->tokens.back() + 1;
  }
  return batch;
}

// ----------------------------------------------------------------------------------------- layer

struct BoundDecode {
  std::shared_ptr<BoundPages> pages;
  std::shared_ptr<BoundRule> rule;              // null in exact mode
  std::shared_ptr<BoundIndex> index;            // null where all tokens are compared by code
  std::shared_ptr<SimHash> hasher;              // null where calls bring codes
  std::shared_ptr<BoundSignatures> signatures;  // these three null then
  SignatureRule signature_rule;                 // of these
  std::shared_ptr<ThreadPool> pool;
  float scale;
  int exact_below;
  Isa isa;
  std::vector<float> center;  // set once; empty until then
  DecodeRecord record;
};

std::unique_ptr<BoundDecode> make_layer(std::shared_ptr<BoundPages> pages,
                                        std::shared_ptr<BoundRule> rule,
                                        std::shared_ptr<BoundIndex> index,
                                        std::shared_ptr<SimHash> hasher, double scale,
                                        int64_t exact_below, Isa isa,
                                        std::shared_ptr<ThreadPool> pool) {
  check_isa(isa);
  check_sampling(rule.get(), index.get(), *pages);
  if (rule == nullptr && hasher != nullptr)
    refuse("hasher is given without a rule, but exact attention has no codes; pass both or None.");
  if (hasher != nullptr) check_hash(*hasher, rule->rule, pages->pages);
  auto layer = std::make_unique<BoundDecode>();
  layer->scale = finite_scale(scale);
  layer->exact_below = token_count("exact_below", exact_below);
  layer->isa = isa;
  layer->pages = std::move(pages);
  layer->rule = std::move(rule);
  layer->index = std::move(index);
  layer->hasher = std::move(hasher);
  layer->pool = std::move(pool);
  return layer;
}

std::unique_ptr<BoundDecode> make_signature_layer(std::shared_ptr<BoundSignatures> signatures,
                                                  const SignatureRule& rule, double scale,
                                                  int64_t exact_below, Isa isa,
                                                  std::shared_ptr<ThreadPool> pool) {
  auto layer = make_layer(signatures->pages, nullptr, nullptr, nullptr, scale, exact_below, isa,
                          std::move(pool));
  layer->signatures = std::move(signatures);
  layer->signature_rule = rule;
  return layer;
}

void set_center(BoundDecode& self, const py::array& center) {
  std::vector<float> value = center_of(self.rule.get(), self.pages->pages, center);
  if (!self.center.empty())
    refuse("This layer has its center, by which codes are stored; make a new layer for another.");
  self.center = std::move(value);
}

const uint16_t* codes_of_call(const BoundDecode& layer, const std::optional<py::array>& query_codes,
                              int num_reqs, int num_q_heads) {
  const bool wanted = !layer.center.empty() && layer.hasher == nullptr;
  if (wanted != query_codes.has_value())
    refuse("query_codes are ", wanted ? "None" : "given", ", but this layer ",
           wanted         ? "has no hasher"
           : layer.hasher ? "has a hasher"
                          : "attends exactly",
           "; ", wanted ? "pass them" : "pass None", ".");
  return wanted ? query_codes_of(layer.rule->rule, *query_codes, num_reqs, num_q_heads) : nullptr;
}

void attend(BoundDecode& self, py::handle query, const BoundBatch& batch, py::handle out,
            std::optional<py::array>& lse, std::optional<py::array>& rows,
            const std::optional<py::array>& query_codes, std::optional<py::array>& error_bars) {
  const Clock::time_point start = Clock::now();
  const Pages& pages = self.pages->pages;
  if (batch.num_blocks != pages.num_blocks() || batch.block_size != pages.layout().block_size)
    refuse("batch was made for ", batch.num_blocks, " blocks of ", batch.block_size,
           " tokens, but this layer has ", pages.num_blocks(), " of ", pages.layout().block_size,
           "; make one with these pages.");
  const Requests requests = batch.requests();
  DecodeInput in = {};
  const RowsArgument queries = rows_argument("query", query, pages, batch.num_tokens, -1);
  in.query = queries.view();
  in.query_type = queries.type;
  in.tokens = batch.tokens.empty() ? nullptr : batch.tokens.data();
  in.num_q_heads = check_query_heads(queries.shape[1], pages);
  in.scale = self.scale;
  in.exact_below = self.exact_below;
  const SignatureInput signatures = {&self.signature_rule,
                                     self.signatures == nullptr ? nullptr : &self.signatures->pool};
  if (signatures.pool != nullptr) in.signatures = &signatures;
  SampleInput sample = {};
  sample.query_codes = codes_of_call(self, query_codes, requests.size, in.num_q_heads);
  if (!self.center.empty()) {
    sample.rule = &self.rule->rule;
    sample.index = self.index == nullptr ? nullptr : &self.index->index;
    in.sample = &sample;
    in.hash = self.hasher.get();
    in.center = self.center.data();
  }

  DecodeOutput result = {};
  const RowsArgument outputs = rows_argument("out", out, pages, batch.num_tokens, in.num_q_heads);
  check_output(outputs);
  result.out = outputs.data;
  result.token_stride = outputs.strides[0];
  result.out_type = outputs.type;
  // Where nobody asks for the rows, the record does.
  std::vector<int32_t> own_rows;
  const std::initializer_list<Dim> heads = {{"num_reqs", requests.size},
                                            {"num_q_heads", in.num_q_heads}};
  if (lse.has_value()) result.lse = output<float>("lse", *lse, heads);
  if (rows.has_value()) {
    result.sampled_rows = output<int32_t>("rows", *rows, heads);
  } else {
    own_rows.resize(static_cast<size_t>(requests.size) * static_cast<size_t>(in.num_q_heads));
    result.sampled_rows = own_rows.data();
  }

  float* const bars = error_bars ? output<float>("error_bars", *error_bars, heads) : nullptr;

  const auto named = [](const char* name, const std::optional<py::array>& array) {
    return array.has_value() ? Named{name, *array} : Named{name, {0, 0}};
  };
  const Named written[] = {{"out", outputs.extent()},
                           named("lse", lse),
                           named("rows", rows),
                           named("error_bars", error_bars)};
  const Named read[] = {{"query", queries.extent()},
                        {"the memory of the pages", self.pages->memory},
                        named("query_codes", query_codes)};
  for (const Named& one : written)
    for (const Named& other : read) check_apart(one, {other});
  check_apart(written[0], {written[1], written[2], written[3]});
  check_apart(written[1], {written[2], written[3]});
  check_apart(written[2], {written[3]});

  py::gil_scoped_release release;
  decode_attention(pages, requests, in, result, self.isa, *self.pool);
  if (bars != nullptr) {
    const size_t size = static_cast<size_t>(requests.size) * static_cast<size_t>(in.num_q_heads);
    result.error_bars.resize(size, std::numeric_limits<float>::quiet_NaN());
    std::copy_n(result.error_bars.data(), size, bars);
  }
  self.record.add(nullptr, in.num_q_heads, result, 0, nanoseconds_since(start));
}

}  // namespace

void bind_decode(py::module_& m) {
  using py::arg;

  m.def("sample", &sample_arrays, arg("pages"), arg("rule"), arg("index").none(true),
        array_arg("query_codes"), array_arg("block_tables"), array_arg("seq_lens"), py::kw_only(),
        arg("isa"), arg("pool"));

  py::class_<BoundBatch>(m, "DecodeBatch")
      .def(py::init(&make_batch), arg("pages").none(false), array_arg("block_tables"),
           array_arg("seq_lens"), array_arg("tokens").none(true) = py::none());

  py::class_<DecodeCounters>(m, "DecodeCounters")
      .def_readonly("decode_steps", &DecodeCounters::decode_steps)
      .def_readonly("sampled_heads", &DecodeCounters::sampled_heads)
      .def_readonly("exact_heads", &DecodeCounters::exact_heads)
      .def_readonly("sampled_rows", &DecodeCounters::sampled_rows)
      .def_readonly("middle_rows", &DecodeCounters::middle_rows)
      .def_readonly("error_bars", &DecodeCounters::error_bars)
      .def_readonly("error_bar_sum", &DecodeCounters::error_bar_sum)
      .def_readonly("hash_ns", &DecodeCounters::hash_ns)
      .def_readonly("lookup_ns", &DecodeCounters::lookup_ns)
      .def_readonly("attend_ns", &DecodeCounters::attend_ns)
      .def_readonly("store_ns", &DecodeCounters::store_ns)
      .def_readonly("step_ns", &DecodeCounters::step_ns);

  py::class_<BoundDecode>(m, "DecodeLayer")
      .def(py::init(&make_layer), arg("pages").none(false), arg("rule").none(true),
           arg("index").none(true), arg("hasher").none(true), py::kw_only(), arg("scale"),
           arg("exact_below"), arg("isa"), arg("pool").none(false))
      .def_static("of_signatures", &make_signature_layer, arg("signatures").none(false),
                  arg("rule"), py::kw_only(), arg("scale"), arg("exact_below"), arg("isa"),
                  arg("pool").none(false))
      .def("set_center", &set_center, array_arg("center"))
      .def("attend", &attend, arg("query"), arg("batch"), arg("out"),
           array_arg("lse").none(true) = py::none(), array_arg("rows").none(true) = py::none(),
           array_arg("query_codes").none(true) = py::none(),
           array_arg("error_bars").none(true) = py::none())
      .def_property_readonly("counters", [](const BoundDecode& d) { return d.record.counters(); })
      .def("recent_rows", [](const BoundDecode& d) { return recent_rows(d.record); })
      .def("forget_steps", [](BoundDecode& d) { d.record.forget(); });
}

}  // namespace magicpig
