// The part of vllm_magicpig._C for decode in stream order. As in bindings.cpp, each function checks
// its input; what only the stream knows is checked by StreamStep.
//
// A callback outlives whatever Python drops. Each object here that owns memory therefore asks, when
// it is destroyed, whether a callback may still come for it, and if so leaves that memory behind:
// only the end of a process does that, and neither a wait nor a crash would be better there.
#include <atomic>
#include <optional>

#include "bindings.h"
#include "stream.h"

namespace magicpig {
namespace {

/// Whether callbacks hold the object, too.
template <class T>
bool in_flight(const std::shared_ptr<T>& core) {
  if (core.use_count() > 1) return true;
  std::atomic_thread_fence(std::memory_order_acquire);  // with the last callback's release
  return false;
}

std::shared_ptr<HostCallbacks> make_callbacks(uintptr_t launch_host_func) {
  if (launch_host_func == 0)
    refuse(
        "launch_host_func is 0, but is the address of cuLaunchHostFunc; pass "
        "find_launch_host_func().");
  return std::make_shared<HostCallbacks>(reinterpret_cast<LaunchHostFunc>(launch_host_func));
}

// ------------------------------------------------------------------------------------------ step

/// Metadata, and the arrays whose memory it is.
struct BoundMetadata {
  std::vector<py::array> arrays;
  std::shared_ptr<const StreamMetadata> metadata;

  BoundMetadata(const py::array& block_tables, const py::array& seq_lens, const py::array& slots)
      : arrays{block_tables, seq_lens, slots} {
    StreamMetadata m;
    m.block_tables = input<int32_t>("block_tables", block_tables, {{"max_reqs"}, {"max_blocks"}});
    m.max_reqs = in_range("max_reqs", block_tables.shape(0), 0, INT_MAX);
    m.max_blocks = in_range("max_blocks", block_tables.shape(1), 0, INT_MAX);
    m.seq_lens = input<int32_t>("seq_lens", seq_lens, {{"max_reqs", m.max_reqs}});
    m.slots = input<int64_t>("slots", slots, {{"max_tokens"}});
    m.max_tokens = in_range("max_tokens", slots.shape(0), 0, INT_MAX);
    metadata = std::make_shared<const StreamMetadata>(m);
  }
  ~BoundMetadata() {
    if (in_flight(metadata)) new std::vector<py::array>(std::move(arrays));
  }
};

struct BoundStep {
  std::shared_ptr<BoundMetadata> metadata;  // outlives the step, which holds on to it
  std::shared_ptr<StreamStep> step;
};

/// The values of an array of num_values, each in low..high.
template <class T>
std::vector<T> values_in(const char* name, const py::array& array, Dim num_values, int64_t low,
                         int64_t high) {
  const T* value = input<T>(name, array, {num_values});
  for (py::ssize_t i = 0; i < array.size(); ++i)
    if (value[i] < low || value[i] > high)
      refuse(name, "[", i, "] is ", value[i], ", but must lie in ", low, "..", high,
             "; pass rows and tokens of this step.");
  return {value, value + array.size()};
}

std::shared_ptr<BoundStep> make_step(std::shared_ptr<BoundMetadata> metadata, int64_t num_reqs,
                                     int64_t num_tokens, const py::array& decode_rows,
                                     const py::array& decode_tokens, const py::array& chunk_rows,
                                     const py::array& chunk_starts, const py::array& chunk_stops) {
  const StreamMetadata& arrays = *metadata->metadata;
  const int reqs = in_range("num_reqs", num_reqs, 0, arrays.max_reqs);
  const int tokens = in_range("num_tokens", num_tokens, 0, arrays.max_tokens);
  StreamStep::Known known;
  known.decode_rows = values_in<int32_t>("decode_rows", decode_rows, {"num_decodes"}, 0, reqs - 1);
  const Dim num_decodes = {"num_decodes", decode_rows.size()};
  known.decode_tokens =
      values_in<int64_t>("decode_tokens", decode_tokens, num_decodes, 0, tokens - 1);
  known.chunk_rows = values_in<int32_t>("chunk_rows", chunk_rows, {"num_chunks"}, 0, reqs - 1);
  const Dim num_chunks = {"num_chunks", chunk_rows.size()};
  known.chunk_starts = values_in<int64_t>("chunk_starts", chunk_starts, num_chunks, 0, tokens);
  known.chunk_stops = values_in<int64_t>("chunk_stops", chunk_stops, num_chunks, 0, tokens);
  for (size_t i = 0; i < known.chunk_rows.size(); ++i)
    if (known.chunk_starts[i] >= known.chunk_stops[i])
      refuse("chunk_starts[", i, "] is ", known.chunk_starts[i], ", but chunk_stops[", i, "] is ",
             known.chunk_stops[i], "; pass chunks of one token or more.");
  std::vector<bool> named(static_cast<size_t>(reqs));
  for (const std::vector<int32_t>* rows : {&known.decode_rows, &known.chunk_rows})
    for (int32_t row : *rows) {
      if (named[static_cast<size_t>(row)])
        refuse("Row ", row,
               " is named twice among decode_rows and chunk_rows, but a request does "
               "one thing in a step; pass it once.");
      named[static_cast<size_t>(row)] = true;
    }
  auto step = std::make_shared<StreamStep>(metadata->metadata, std::move(known));
  return std::shared_ptr<BoundStep>(new BoundStep{std::move(metadata), std::move(step)});
}

// ----------------------------------------------------------------------------------------- layer

/// The buffers, and the arrays whose memory they are.
struct BoundExchange {
  std::vector<py::array> arrays;
  DecodeExchange buffers;
  int64_t num_kv_heads;
  int64_t head_size;
  int64_t num_tables;  // 0 without codes
  bool float32_rows;
};

std::shared_ptr<BoundExchange> make_exchange(const py::array& query, const py::array& key,
                                             const py::array& value,
                                             const std::optional<py::array>& query_codes,
                                             const std::optional<py::array>& key_codes,
                                             py::array& out) {
  BoundExchange e = {};
  e.buffers.query = input<float>("query", query, {{"max_decodes"}, {"num_q_heads"}, {"head_size"}});
  e.buffers.max_decodes = in_range("max_decodes", query.shape(0), 1, INT_MAX);
  e.buffers.num_q_heads = in_range("num_q_heads", query.shape(1), 1, INT_MAX);
  e.head_size = query.shape(2);
  const Dim max_decodes = {"max_decodes", query.shape(0)};
  const Dim num_q_heads = {"num_q_heads", query.shape(1)};
  const Dim head_size = {"head_size", e.head_size};
  e.buffers.out = output<float>("out", out, {max_decodes, num_q_heads, head_size});

  check_shape("key", key, {max_decodes, {"num_kv_heads"}, head_size});
  e.num_kv_heads = key.shape(1);
  const Dim num_kv_heads = {"num_kv_heads", e.num_kv_heads};
  e.float32_rows = py::isinstance<py::array_t<float>>(key);
  const auto rows = [&](const char* name, const py::array& array) {
    if (e.float32_rows)
      return reinterpret_cast<const uint8_t*>(
          input<float>(name, array, {max_decodes, num_kv_heads, head_size}));
    return reinterpret_cast<const uint8_t*>(
        input<uint16_t>(name, array, {max_decodes, num_kv_heads, head_size}));
  };
  e.buffers.key = rows("key", key);
  e.buffers.value = rows("value", value);
  check_apart({"out", out}, {{"query", query}, {"key", key}, {"value", value}});
  e.arrays = {query, key, value, out};

  if (query_codes.has_value() != key_codes.has_value())
    refuse(
        "Of query_codes and key_codes one is None, but sampling needs both and exact attention "
        "none; pass both or None.");
  if (query_codes.has_value()) {
    e.buffers.query_codes =
        input<uint16_t>("query_codes", *query_codes, {max_decodes, num_q_heads, {"L"}});
    e.num_tables = query_codes->shape(2);
    e.buffers.key_codes =
        input<uint16_t>("key_codes", *key_codes, {max_decodes, num_kv_heads, {"L", e.num_tables}});
    check_apart({"out", out}, {{"query_codes", *query_codes}, {"key_codes", *key_codes}});
    e.arrays.push_back(*query_codes);
    e.arrays.push_back(*key_codes);
  }
  return std::make_shared<BoundExchange>(std::move(e));
}

/// The layer, and what its callbacks reach by raw pointers.
struct BoundLayer {
  struct Owned {
    std::shared_ptr<BoundPages> pages;
    std::shared_ptr<BoundRule> rule;
    std::shared_ptr<BoundIndex> index;
    std::shared_ptr<BoundSignatures> signatures;
    std::shared_ptr<BoundExchange> exchange;
    std::shared_ptr<SegmentBuilder> builder;
    std::shared_ptr<ThreadPool> pool;
  };
  Owned owned;
  std::shared_ptr<StreamLayer> layer;

  BoundLayer(Owned owned_, StreamLayer::Parts parts)
      : owned(std::move(owned_)), layer(std::make_shared<StreamLayer>(std::move(parts))) {}
  ~BoundLayer() {
    if (in_flight(layer)) {
      new Owned(std::move(owned));
    } else if (owned.builder != nullptr && owned.index != nullptr) {
      py::gil_scoped_release release;
      owned.builder->forget(owned.index->index);
    }
  }
};

void check_exchange(const BoundExchange& exchange, const Pages& pages, bool sampled) {
  const PageLayout& layout = pages.layout();
  check_query_heads(exchange.buffers.num_q_heads, pages);
  if (exchange.num_kv_heads != pages.num_kv_heads() || exchange.head_size != layout.head_size)
    refuse("exchange has ", exchange.num_kv_heads, " kv heads of size ", exchange.head_size,
           ", but the pages have ", pages.num_kv_heads(), " of ", layout.head_size,
           "; make one for this layer.");
  if (exchange.float32_rows != (layout.row_type == RowType::float32))
    refuse("exchange has rows of ", exchange.float32_rows ? 4 : 2,
           "-byte elements, but the pages of ", element_bytes(layout.row_type),
           "; make it of the pages' row dtype.");
  if (sampled && exchange.num_tables != layout.num_tables)
    refuse("exchange has codes of ", exchange.num_tables, " tables, but the pages of ",
           layout.num_tables, "; make it with the pages' tables.");
}

/// What every layer has, checked.
StreamLayer::Parts parts_of(BoundPages& pages, const BoundExchange& exchange,
                            std::shared_ptr<HostCallbacks> callbacks, double scale,
                            int64_t exact_below, Isa isa, ThreadPool& pool) {
  check_isa(isa);
  for (const py::array& array : exchange.arrays)
    check_apart({"the memory of the pages", pages.memory}, {{"exchange", array}});
  StreamLayer::Parts parts = {};
  parts.pages = &pages.pages;
  parts.exchange = exchange.buffers;
  parts.callbacks = std::move(callbacks);
  parts.scale = finite_scale(scale);
  parts.exact_below = std::max(1, token_count("exact_below", exact_below));
  parts.isa = isa;
  parts.pool = &pool;
  return parts;
}

std::unique_ptr<BoundLayer> make_layer(
    std::shared_ptr<BoundPages> pages, std::shared_ptr<BoundRule> rule,
    std::shared_ptr<BoundIndex> index, std::shared_ptr<BoundExchange> exchange,
    std::shared_ptr<HostCallbacks> callbacks, std::shared_ptr<SegmentBuilder> builder, double scale,
    int64_t exact_below, Isa isa, std::shared_ptr<ThreadPool> pool) {
  check_sampling(rule.get(), index.get(), *pages);
  if (builder != nullptr && index == nullptr)
    refuse("builder is given without an index, but has nothing to build then; pass None.");
  check_exchange(*exchange, pages->pages, rule != nullptr);
  StreamLayer::Parts parts =
      parts_of(*pages, *exchange, std::move(callbacks), scale, exact_below, isa, *pool);
  if (rule != nullptr) parts.rule = &rule->rule;
  if (index != nullptr) parts.index = &index->index;
  parts.builder = builder.get();
  return std::make_unique<BoundLayer>(
      BoundLayer::Owned{std::move(pages), std::move(rule), std::move(index), nullptr,
                        std::move(exchange), std::move(builder), std::move(pool)},
      std::move(parts));
}

std::unique_ptr<BoundLayer> make_signature_layer(std::shared_ptr<BoundSignatures> signatures,
                                                 const SignatureRule& rule,
                                                 std::shared_ptr<BoundExchange> exchange,
                                                 std::shared_ptr<HostCallbacks> callbacks,
                                                 double scale, int64_t exact_below, Isa isa,
                                                 std::shared_ptr<ThreadPool> pool) {
  std::shared_ptr<BoundPages> pages = signatures->pages;
  check_exchange(*exchange, pages->pages, false);
  for (const py::array& array : exchange->arrays)
    check_apart({"the memory of the signatures", signatures->memory}, {{"exchange", array}});
  StreamLayer::Parts parts =
      parts_of(*pages, *exchange, std::move(callbacks), scale, exact_below, isa, *pool);
  parts.signatures = &signatures->pool;
  parts.signature_rule = rule;
  return std::make_unique<BoundLayer>(
      BoundLayer::Owned{std::move(pages), nullptr, nullptr, std::move(signatures),
                        std::move(exchange), nullptr, std::move(pool)},
      std::move(parts));
}

void set_center(BoundLayer& self, const py::array& center) {
  self.layer->set_center(center_of(self.owned.rule.get(), self.owned.pages->pages, center));
}

void launch_stored(BoundLayer& self, uintptr_t stream, const BoundStep& step) {
  py::gil_scoped_release release;
  self.layer->launch_stored(reinterpret_cast<void*>(stream), step.step);
}

void launch_encode(BoundLayer& self, uintptr_t stream, const BoundStep& step) {
  py::gil_scoped_release release;
  self.layer->launch_encode(reinterpret_cast<void*>(stream), step.step);
}

void launch_decode(BoundLayer& self, uintptr_t stream, const BoundStep& step) {
  py::gil_scoped_release release;
  self.layer->launch_decode(reinterpret_cast<void*>(stream), step.step);
}

void ask(const std::shared_ptr<SegmentBuilder>& self, BoundIndex& index,
         const py::array& block_tables, const py::array& seq_lens) {
  const Requests requests = requests_of(index.pages->pages, block_tables, seq_lens);
  const std::shared_ptr<SegmentBuilder> other = index.builder.lock();
  if (other != nullptr && other != self)
    refuse("index has another builder, which may be building for it; ask that one.");
  index.builder = self;
  py::gil_scoped_release release;
  self->ask(index.index, requests);
}

/// Destroyed with the GIL released: its thread may be building a segment.
std::shared_ptr<SegmentBuilder> make_builder(const std::vector<int>& cpus,
                                             std::shared_ptr<ThreadPool> gives_way_to) {
  py::gil_scoped_release release;
  return std::shared_ptr<SegmentBuilder>(new SegmentBuilder(cpus, std::move(gives_way_to)),
                                         [](SegmentBuilder* builder) {
                                           py::gil_scoped_release release_again;
                                           delete builder;
                                         });
}

}  // namespace

void bind_streams(py::module_& m) {
  using py::arg;
  using release_gil = py::call_guard<py::gil_scoped_release>;

  m.def("find_launch_host_func",
        [] { return reinterpret_cast<uintptr_t>(find_launch_host_func()); });

  py::class_<HostCallbacks, std::shared_ptr<HostCallbacks>>(m, "HostCallbacks")
      .def(py::init(&make_callbacks), arg("launch_host_func"))
      .def("raise_error", [](HostCallbacks& c) { c.raise_error(); })
      .def_property_readonly("pending", [](const HostCallbacks& c) { return c.pending(); });

  py::class_<BoundMetadata, std::shared_ptr<BoundMetadata>>(m, "StreamMetadata")
      .def(py::init<const py::array&, const py::array&, const py::array&>(),
           array_arg("block_tables"), array_arg("seq_lens"), array_arg("slots"));

  py::class_<BoundStep, std::shared_ptr<BoundStep>>(m, "StreamStep")
      .def(py::init(&make_step), arg("metadata").none(false), arg("num_reqs"), arg("num_tokens"),
           array_arg("decode_rows"), array_arg("decode_tokens"), array_arg("chunk_rows"),
           array_arg("chunk_starts"), array_arg("chunk_stops"));

  py::class_<BoundExchange, std::shared_ptr<BoundExchange>>(m, "DecodeExchange")
      .def(py::init(&make_exchange), array_arg("query"), array_arg("key"), array_arg("value"),
           array_arg("query_codes").none(true), array_arg("key_codes").none(true), array_arg("out"))
      .def_property_readonly("max_decodes",
                             [](const BoundExchange& e) { return e.buffers.max_decodes; });

  py::class_<SegmentBuilder, std::shared_ptr<SegmentBuilder>>(m, "SegmentBuilder")
      .def(py::init(&make_builder), arg("cpus"), arg("gives_way_to").none(true) = py::none())
      .def("ask", &ask, arg("index").none(false), array_arg("block_tables"), array_arg("seq_lens"))
      .def(
          "drain", [](SegmentBuilder& b) { b.drain(); }, release_gil())
      .def(
          "close", [](SegmentBuilder& b) { b.close(); }, release_gil())
      .def("raise_error", [](SegmentBuilder& b) { b.raise_error(); })
      .def_property_readonly("pending", [](const SegmentBuilder& b) { return b.pending(); });

  py::class_<BoundLayer>(m, "StreamLayer")
      .def(py::init(&make_layer), arg("pages").none(false), arg("rule").none(true),
           arg("index").none(true), arg("exchange").none(false), arg("callbacks").none(false),
           arg("builder").none(true), py::kw_only(), arg("scale"), arg("exact_below"), arg("isa"),
           arg("pool").none(false))
      .def_static("of_signatures", &make_signature_layer, arg("signatures").none(false),
                  arg("rule"), arg("exchange").none(false), arg("callbacks").none(false),
                  py::kw_only(), arg("scale"), arg("exact_below"), arg("isa"),
                  arg("pool").none(false))
      .def("set_center", &set_center, array_arg("center"))
      .def("launch_stored", &launch_stored, arg("stream"), arg("step"))
      .def("launch_encode", &launch_encode, arg("stream"), arg("step"))
      .def("launch_decode", &launch_decode, arg("stream"), arg("step"))
      .def_property_readonly("counters",
                             [](const BoundLayer& b) { return b.layer->record().counters(); })
      .def("recent_rows", [](const BoundLayer& b) { return recent_rows(b.layer->record()); })
      .def("forget_steps", [](BoundLayer& b) { b.layer->forget_steps(); });
}

}  // namespace magicpig
