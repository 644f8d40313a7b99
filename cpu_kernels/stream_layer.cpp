// What the callbacks of a sparse layer do: note what the stream stored, encode it, or store and
// attend.
#include <algorithm>
#include <limits>
#include <utility>

#include "checks.h"
#include "stream.h"
#include "timing.h"

namespace magicpig {
namespace {

/// The requests' lengths, 0 where `middle` says that too little of them is sampled from.
template <class Middle>
std::vector<int32_t> sampled_lengths(const Requests& requests, int exact_below,
                                     const Middle& middle) {
  std::vector<int32_t> seq_lens(requests.seq_lens, requests.seq_lens + requests.size);
  for (int32_t& seq_len : seq_lens)
    if (middle(seq_len).size() < exact_below) seq_len = 0;
  return seq_lens;
}

}  // namespace

// ------------------------------------------------------------------------------------------ jobs

class StreamLayer::Job : public HostJob {
 public:
  Job(std::shared_ptr<StreamLayer> layer, std::shared_ptr<StreamStep> step)
      : layer_(std::move(layer)), center_(layer_->center()), step_(std::move(step)) {}

  void run() final {
    const StepContents* contents = step_->contents(*parts().pages);
    if (contents == nullptr) return abandon();
    run(*contents);
  }

  /// Writes that were not noted leave segments that seem valid: none is trusted any more.
  void abandon() noexcept override { parts().pages->distrust(); }

 protected:
  virtual void run(const StepContents& contents) = 0;

  const Parts& parts() const { return layer_->parts_; }

  const std::shared_ptr<StreamLayer> layer_;
  const Center center_;  // as of the launch
  const std::shared_ptr<StreamStep> step_;
};

class StreamLayer::Stored final : public Job {
 public:
  using Job::Job;

 private:
  void run(const StepContents& contents) override {
    layer_->note_chunks(contents, center_ != nullptr);
  }
};

class StreamLayer::Encode final : public Job {
 public:
  using Job::Job;

 private:
  void run(const StepContents& contents) override { layer_->encode_chunks(contents); }
};

class StreamLayer::Decode final : public Job {
 public:
  using Job::Job;

  void abandon() noexcept override {
    const DecodeExchange& exchange = parts().exchange;
    const size_t row = static_cast<size_t>(exchange.num_q_heads) *
                       static_cast<size_t>(parts().pages->layout().head_size);
    std::fill_n(exchange.out, step_->num_decodes() * row, std::numeric_limits<float>::quiet_NaN());
    Job::abandon();
  }

 private:
  void run(const StepContents& contents) override {
    layer_->decode(contents, center_ == nullptr ? nullptr : center_->data());
  }
};

// -------------------------------------------------------------------------------------- launches

void StreamLayer::set_center(std::vector<float> center) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (center_ != nullptr)
    refuse("This layer has its center, by which codes are stored; make a new layer for another.");
  center_ = std::make_shared<const std::vector<float>>(std::move(center));
}

StreamLayer::Center StreamLayer::center() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return center_;
}

void StreamLayer::launch_stored(void* stream, std::shared_ptr<StreamStep> step) {
  step->bind(*parts_.pages);
  if (step->num_chunks() == 0) return;
  parts_.callbacks->launch(stream, std::make_unique<Stored>(shared_from_this(), std::move(step)));
}

void StreamLayer::launch_encode(void* stream, std::shared_ptr<StreamStep> step) {
  if (parts_.signatures == nullptr)
    refuse("This layer has no signatures to encode; make one with of_signatures.");
  step->bind(*parts_.pages);
  if (step->num_chunks() == 0) return;
  parts_.callbacks->launch(stream, std::make_unique<Encode>(shared_from_this(), std::move(step)));
}

void StreamLayer::launch_decode(void* stream, std::shared_ptr<StreamStep> step) {
  step->bind(*parts_.pages);
  if (step->num_decodes() == 0) return;
  if (step->num_decodes() > static_cast<size_t>(parts_.exchange.max_decodes))
    refuse("The step has ", step->num_decodes(), " decodes, but the exchange holds ",
           parts_.exchange.max_decodes, "; make it as large as the batches.");
  parts_.callbacks->launch(stream, std::make_unique<Decode>(shared_from_this(), std::move(step)));
}

// ----------------------------------------------------------------------------------- in callbacks

void StreamLayer::note_chunks(const StepContents& contents, bool with_codes) {
  parts_.pages->note_writes(contents.chunk_slots.data(), contents.chunk_slots.size());
  if (with_codes) ask_for_segments(contents.chunks());
}

void StreamLayer::encode_chunks(const StepContents& contents) {
  const Requests chunks = contents.chunks();
  const std::vector<int32_t> seq_lens = sampled_lengths(
      chunks, parts_.exact_below, [&](int n) { return parts_.signature_rule.middle(n); });
  parts_.signatures->encode({chunks.tables, chunks.stride, seq_lens.data(), chunks.size},
                            parts_.isa, *parts_.pool);
}

void StreamLayer::decode(const StepContents& contents, const float* center) {
  const Clock::time_point start = Clock::now();
  store(contents, center != nullptr);
  const Clock::time_point stored = Clock::now();

  const Requests requests = contents.decodes();
  const DecodeExchange& exchange = parts_.exchange;
  const size_t num_heads =
      static_cast<size_t>(requests.size) * static_cast<size_t>(exchange.num_q_heads);
  const ptrdiff_t head_bytes =
      static_cast<ptrdiff_t>(static_cast<size_t>(parts_.pages->layout().head_size) * sizeof(float));
  DecodeInput input = {};
  input.query = {reinterpret_cast<const uint8_t*>(exchange.query),
                 head_bytes * exchange.num_q_heads, head_bytes};
  input.query_type = RowType::float32;
  input.num_q_heads = exchange.num_q_heads;
  input.scale = parts_.scale;
  input.exact_below = parts_.exact_below;
  const SampleInput sample = {parts_.rule, parts_.index, exchange.query_codes};
  if (center != nullptr) {
    input.sample = &sample;
    input.center = center;
  }
  const SignatureInput signatures = {&parts_.signature_rule, parts_.signatures};
  if (parts_.signatures != nullptr) input.signatures = &signatures;
  std::vector<int32_t> rows(num_heads);
  DecodeOutput output = {};
  output.out = reinterpret_cast<uint8_t*>(exchange.out);
  output.token_stride = head_bytes * exchange.num_q_heads;
  output.out_type = RowType::float32;
  output.sampled_rows = rows.data();
  decode_attention(*parts_.pages, requests, input, output, parts_.isa, *parts_.pool);
  if (output.unsealed_stretches > 0)
    ask_for_segments(requests);
  else if (center != nullptr)
    ask_for_segments({});  // what went stale is given back

  record_.add(contents.decode_slots.data(), exchange.num_q_heads, output,
              nanoseconds(stored - start), nanoseconds_since(start));
}

/// The decodes' rows, and codes where there is a centre.
void StreamLayer::store(const StepContents& contents, bool with_codes) {
  const Pages& pages = *parts_.pages;
  const DecodeExchange& exchange = parts_.exchange;
  const int64_t* slots = contents.decode_slots.data();
  const size_t num_decodes = contents.decode_slots.size();
  if (with_codes) {
    const size_t size =
        static_cast<size_t>(exchange.num_q_heads) * static_cast<size_t>(pages.layout().num_tables);
    for (size_t i = 0; i < num_decodes; ++i)
      if (slots[i] >= 0)
        check_query_codes(exchange.query_codes + i * size, size, parts_.rule->table->num_bits());
  }
  const ptrdiff_t head = static_cast<ptrdiff_t>(pages.layout().row_bytes() / 2);
  const ptrdiff_t token = head * pages.num_kv_heads();
  parts_.pages->store_rows({exchange.key, token, head}, {exchange.value, token, head}, slots,
                           num_decodes, *parts_.pool);
  if (with_codes) parts_.pages->store_codes(exchange.key_codes, slots, num_decodes, *parts_.pool);
}

/// Only requests that are long enough to be sampled are worth an index.
void StreamLayer::ask_for_segments(const Requests& requests) {
  if (parts_.builder == nullptr || parts_.index == nullptr) return;
  const std::vector<int32_t> seq_lens = sampled_lengths(
      requests, parts_.exact_below, [&](int n) { return middle_of(n, *parts_.rule); });
  parts_.builder->ask(*parts_.index,
                      {requests.tables, requests.stride, seq_lens.data(), requests.size});
}

}  // namespace magicpig
