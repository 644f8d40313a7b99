// Signatures in Python: encoding, the pool of a layer, its rule, and the lists that a step draws.
#include "bindings_rows.h"
#include "signatures.h"

namespace magicpig {

namespace {

SignatureLayout layout_of(int head_size, int64_t bits) {
  if (bits != 1 && bits != 2 && bits != 4)
    refuse("bits is ", bits, ", but must be 1, 2 or 4; pass one of them.");
  return SignatureLayout::of(head_size, static_cast<int>(bits));
}

const int8_t* signs_of(const py::array& signs, const SignatureLayout& layout) {
  const int8_t* sign = input<int8_t>("signs", signs, {{"2", 2}, {"size", layout.size}});
  for (py::ssize_t i = 0; i < signs.size(); ++i)
    if (sign[i] != 1 && sign[i] != -1)
      refuse("signs holds ", static_cast<int>(sign[i]), ", but must hold 1 and -1; pass signs.");
  return sign;
}

py::array_t<uint8_t> encode_array(const py::array& keys, const std::string& row_dtype,
                                  const py::array& signs, int64_t bits, Isa isa, ThreadPool& pool) {
  check_isa(isa);
  const RowType type = row_type_named(row_dtype);
  check_shape("keys", keys, {{"n"}, {"head_size"}});
  const std::initializer_list<Dim> dims = {{"n"}, {"head_size"}};
  const void* key = type == RowType::float32
                        ? static_cast<const void*>(input<float>("keys", keys, dims))
                        : static_cast<const void*>(input<uint16_t>("keys", keys, dims));
  if (keys.shape(0) % kSignatureBlock != 0)
    refuse("keys are of ", keys.shape(0), " tokens, but blocks of ", kSignatureBlock,
           " are encoded; pass whole blocks.");
  const int head_size = check_head_size(keys.shape(1));
  const SignatureLayout layout = layout_of(head_size, bits);
  const int8_t* sign = signs_of(signs, layout);
  const size_t num_blocks = static_cast<size_t>(keys.shape(0) / kSignatureBlock);
  py::array_t<uint8_t> blocks(
      {keys.shape(0) / kSignatureBlock, static_cast<py::ssize_t>(layout.block_bytes())});
  uint8_t* out = blocks.mutable_data();
  const size_t stride = static_cast<size_t>(head_size) * element_bytes(type);
  py::gil_scoped_release release;
  encode_signatures(layout, type, sign, static_cast<const uint8_t*>(key), stride, num_blocks, out,
                    isa, pool);
  return blocks;
}

std::unique_ptr<BoundSignatures> make_pool(std::shared_ptr<BoundPages> pages, py::array memory,
                                           const py::array& signs, int64_t bits) {
  const PageLayout& rows = pages->pages.layout();
  if (rows.block_size % kSignatureBlock != 0)
    refuse("pages have blocks of ", rows.block_size, " tokens, but signatures need a multiple of ",
           kSignatureBlock, "; choose such a block size.");
  const SignatureLayout layout = layout_of(rows.head_size, bits);
  const size_t bytes = SignaturePool::num_bytes(pages->pages, layout);
  uint8_t* data = output<uint8_t>("memory", memory, {{"bytes", static_cast<int64_t>(bytes)}});
  if (reinterpret_cast<uintptr_t>(data) % 64 != 0)
    refuse("memory is not aligned to 64 bytes; align it.");
  check_apart({"memory", memory}, {{"the memory of the pages", pages->memory}});
  const int8_t* sign = signs_of(signs, layout);
  return std::make_unique<BoundSignatures>(std::move(pages), std::move(memory), data, layout, sign);
}

void encode_requests(BoundSignatures& self, const py::array& block_tables,
                     const py::array& seq_lens, Isa isa, ThreadPool& pool) {
  check_isa(isa);
  const Requests requests = requests_of(self.pages->pages, block_tables, seq_lens);
  py::gil_scoped_release release;
  self.pool.encode(requests, isa, pool);
}

uint64_t whole_number(const char* name, int64_t value) {
  if (value < 0) refuse(name, " is ", value, ", but must be 0 or more; correct it.");
  return static_cast<uint64_t>(value);
}

SignatureRule make_rule(int64_t sink_tokens, int64_t window_tokens, double row_budget, int64_t seed,
                        int64_t layer, int64_t first_kv_head) {
  SignatureRule rule = {};
  rule.sink_tokens = token_count("sink_tokens", sink_tokens);
  rule.window_tokens = token_count("window_tokens", window_tokens);
  if (window_tokens < 1)
    refuse("window_tokens is ", window_tokens, ", but must be 1 or more; correct it.");
  if (!(row_budget > 0 && row_budget <= 1))
    refuse("row_budget is ", row_budget, ", but must be above 0 and up to 1; correct it.");
  rule.row_budget = row_budget;
  rule.seed = whole_number("seed", seed);
  rule.layer = whole_number("layer", layer);
  rule.first_kv_head = whole_number("first_kv_head", first_kv_head);
  return rule;
}

/// Per request and kv head (tokens int32, log chances int16).
std::vector<std::vector<py::tuple>> list_arrays(BoundSignatures& self, const SignatureRule& rule,
                                                py::handle query, const py::array& block_tables,
                                                const py::array& seq_lens, double scale,
                                                int64_t exact_below, Isa isa, ThreadPool& pool) {
  check_isa(isa);
  const Pages& pages = self.pages->pages;
  const Requests requests = requests_of(pages, block_tables, seq_lens);
  const RowsArgument queries = rows_argument("query", query, pages, requests.size, -1);
  const SignatureInput signatures = {&rule, &self.pool};
  DecodeInput in = {};
  in.query = queries.view();
  in.query_type = queries.type;
  in.num_q_heads = check_query_heads(queries.shape[1], pages);
  in.scale = finite_scale(scale);
  in.exact_below = std::max(token_count("exact_below", exact_below), 1);
  in.signatures = &signatures;
  std::vector<std::vector<Listed>> lists;
  {
    py::gil_scoped_release release;
    lists = signature_lists(pages, requests, in, isa, pool);
  }
  std::vector<std::vector<py::tuple>> arrays(static_cast<size_t>(requests.size));
  for (size_t i = 0; i < lists.size(); ++i) {
    const py::ssize_t size = static_cast<py::ssize_t>(lists[i].size());
    py::array_t<int32_t> tokens(size);
    py::array_t<int16_t> chances(size);
    for (py::ssize_t k = 0; k < size; ++k) {
      tokens.mutable_at(k) = lists[i][static_cast<size_t>(k)].token;
      chances.mutable_at(k) = lists[i][static_cast<size_t>(k)].log_chance;
    }
    arrays[i / static_cast<size_t>(pages.num_kv_heads())].push_back(
        py::make_tuple(tokens, chances));
  }
  return arrays;
}

}  // namespace

void bind_signatures(py::module_& m) {
  using py::arg;
  m.def("encode_signatures", &encode_array, array_arg("keys"), arg("row_dtype"), array_arg("signs"),
        arg("bits"), arg("isa"), arg("pool"));

  py::class_<SignatureRule>(m, "SignatureRule")
      .def(py::init(&make_rule), py::kw_only(), arg("sink_tokens"), arg("window_tokens"),
           arg("row_budget"), arg("seed"), arg("layer"), arg("first_kv_head"));

  py::class_<BoundSignatures, std::shared_ptr<BoundSignatures>>(m, "SignaturePool")
      .def(py::init(&make_pool), arg("pages").none(false), array_arg("memory"), array_arg("signs"),
           arg("bits"))
      .def("encode", &encode_requests, array_arg("block_tables"), array_arg("seq_lens"),
           py::kw_only(), arg("isa"), arg("pool"))
      .def("lists", &list_arrays, arg("rule"), arg("query"), array_arg("block_tables"),
           array_arg("seq_lens"), py::kw_only(), arg("scale"), arg("exact_below"), arg("isa"),
           arg("pool"))
      .def_property_readonly("num_encoded",
                             [](const BoundSignatures& s) { return s.pool.num_encoded(); });
}

}  // namespace magicpig
