// Blocks of signatures: the exact twin of vllm_magicpig/signature_blocks.py, which has the layout.
//
// Included after sampled_attention.inl in the namespace of each ISA. Every operation is one of
// float32, and sums over dimensions have 16 partial sums, so that all instruction sets write the
// same bytes. Never multiply_add.
//
// Every lane is of another token: a vector holds one dimension of kLanes tokens.
#include "simd_tokens.h"

constexpr double kStepFactors[] = {0.85, 1.0, 1.15};
constexpr int kNumSteps = 3;
constexpr int kParts = 16;  // partial sums over dimensions

/// The quantiser's step, of the root mean square.
inline float step_of(int bits, double factor) {
  return static_cast<float>((bits == 1 ? 1.0 : bits == 2 ? 0.9957 : 0.335) * factor);
}

/// Adds up the partial sums of dimensions j, j + 16 and so on: halves, until one is left.
inline Vec sum_of_parts(Vec (&parts)[kParts]) {
  for (int half = kParts / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] = parts[i] + parts[i + half];
  return parts[0];
}

/// Means of kPairs pairs of vectors of dimensions: all of a row before the next row.
template <class Element, int kPairs>
inline void mean_of_pairs(const uint8_t* keys, size_t stride, float* mean) {
  constexpr int kBytes = 2 * kLanes * Element::kBytes;
  Pair sums[kPairs];
  for (int i = 0; i < kPairs; ++i) sums[i] = load_pair(Element{}, keys + i * kBytes);
  for (size_t t = 1; t < kSignatureBlock; ++t)
    for (int i = 0; i < kPairs; ++i) {
      const Pair terms = load_pair(Element{}, keys + t * stride + i * kBytes);
      sums[i] = {sums[i].first + terms.first, sums[i].second + terms.second};
    }
  const Vec share = broadcast(1.0f / kSignatureBlock);
  for (int i = 0; i < kPairs; ++i)
    store_pair(Element{}, mean + 2 * i * kLanes, {sums[i].first * share, sums[i].second * share});
}

/// The block's mean as it is stored, and as floats.
template <class Element>
inline void mean_key(const uint8_t* keys, size_t stride, int head_size, uint16_t* stored,
                     float* mean) {
  constexpr int kPairs = 4;
  int first = 0;
  for (; first + 2 * kPairs * kLanes <= head_size; first += 2 * kPairs * kLanes)
    mean_of_pairs<Element, kPairs>(keys + first * Element::kBytes, stride, mean + first);
  for (; first + 2 * kLanes <= head_size; first += 2 * kLanes)
    mean_of_pairs<Element, 1>(keys + first * Element::kBytes, stride, mean + first);
  for_each_vector(head_size - first, [&](int d, auto lanes) {
    const uint8_t* from = keys + (first + d) * Element::kBytes;
    Vec sum = load_row(Element{}, from, lanes);
    for (size_t t = 1; t < kSignatureBlock; ++t)
      sum = sum + load_row(Element{}, from + t * stride, lanes);
    store(mean + first + d, sum * broadcast(1.0f / kSignatureBlock), lanes);
  });
  for (int d = 0; d < head_size; ++d) {
    stored[d] = bfloat16_of(mean[d]);
    mean[d] = float_of_bfloat16(stored[d]);
  }
}

/// What is known of kLanes tokens.
struct Tokens {
  alignas(64) float y[kMaxTransform * kLanes];  // rotated residuals, [size][kLanes]
  Vec squares, half;                            // |y|^2, sum of |y_j| / 2
  Vec scales[kNumSteps];                        // of the steps, see scale_of
  Vec products[kNumSteps], norms[kNumSteps];    // <y, c>, 4 |c|^2
  Vec chosen;                                   // the best step's scale
};

/// kRadix rows from y[first] on, times their signs and transformed.
template <int kRadix>
inline void signed_butterflies(float* y, const float* signs, int first) {
  Vec v[kRadix];
  for (int i = 0; i < kRadix; ++i)
    v[i] = load(y + (first + i) * kLanes) * broadcast(signs[first + i]);
  butterflies<kRadix>(v);
  for (int i = 0; i < kRadix; ++i) store(y + (first + i) * kLanes, v[i]);
}

/// The rotation's last butterflies, of rows j, j + 16 and so on, and what is summed over rows.
template <int kRadix>
inline void last_butterflies(Tokens& to) {
  Vec squares[kParts], sizes[kParts];
  for (int part = 0; part < kParts; ++part) {
    float* y = to.y + part * kLanes;
    Vec v[kRadix];
    for (int i = 0; i < kRadix; ++i) v[i] = load(y + i * kParts * kLanes);
    butterflies<kRadix>(v);
    for (int i = 0; i < kRadix; ++i) store(y + i * kParts * kLanes, v[i]);
    squares[part] = v[0] * v[0];
    sizes[part] = absolute(v[0]);
    for (int i = 1; i < kRadix; ++i) {
      squares[part] = squares[part] + v[i] * v[i];
      sizes[part] = sizes[part] + absolute(v[i]);
    }
  }
  to.squares = sum_of_parts(squares);
  to.half = sum_of_parts(sizes) * broadcast(0.5f);
}

/// Keys less the mean, rotated.
template <class Element>
inline void rotate_residuals(const uint8_t* keys, size_t stride, const float* mean,
                             const SignatureLayout& layout, const float* signs, Tokens& to) {
  const int size = layout.size;
  for (int d = 0; d < layout.head_size; d += kColumnsAtOnce) {
    Vec v[kColumnsAtOnce];
    load_columns(Element{}, keys + d * Element::kBytes, stride, v);
    for (int i = 0; i < kColumnsAtOnce; ++i)
      v[i] = (v[i] - broadcast(mean[d + i])) * broadcast(signs[d + i]);
    butterflies<kColumnsAtOnce>(v);
    for (int i = 0; i < kColumnsAtOnce; ++i) store(to.y + (d + i) * kLanes, v[i]);
  }
  const size_t left = static_cast<size_t>((size - layout.head_size) * kLanes);
  memset(to.y + layout.head_size * kLanes, 0, left * sizeof(float));
  switch (size / kColumnsAtOnce) {
    case 2:
      transform_pass<2>(to.y, size, kColumnsAtOnce);
      break;
    case 4:
      transform_pass<4>(to.y, size, kColumnsAtOnce);
      break;
    case 8:
      transform_pass<8>(to.y, size, kColumnsAtOnce);
      break;
    case 16:
      transform_pass<16>(to.y, size, kColumnsAtOnce);
      break;
    default:
      transform_pass<8>(to.y, size, kColumnsAtOnce);
      transform_pass<4>(to.y, size, 8 * kColumnsAtOnce);
  }
  for (int j = 0; j < size; j += kParts) signed_butterflies<kParts>(to.y, signs + size, j);
  switch (size / kParts) {
    case 1:
      return last_butterflies<1>(to);
    case 2:
      return last_butterflies<2>(to);
    case 4:
      return last_butterflies<4>(to);
    case 8:
      return last_butterflies<8>(to);
    default:
      return last_butterflies<16>(to);
  }
}

/// The least float whose product with `inverse` is 1 or more once it is rounded.
///
/// A product rounds to 1 from 1 - 2^-25 on. So that float is the rounded 1 / inverse or one of its
/// two neighbours, and larger floats have no smaller products.
inline Vec first_of_level_one(Vec inverse) {
  const Vec one = broadcast(1.0f);
  Vec first = two_floats_down(one / inverse);
  for (int i = 0; i < 4; ++i) first = next_float_where(less(first * inverse, one), first);
  return first;
}

/// What gives a size its level: with 4 bits the step's inverse, which multiplies the size; with 2
/// the least size of level 1, which saves that product and says the same.
template <int kBits>
inline Vec scale_of(Vec inverse) {
  if constexpr (kBits == 2) return first_of_level_one(inverse);
  return inverse;
}

template <int kBits>
inline void scale_steps(int size, const float* steps, Tokens& to) {
  const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
  const Vec rms = square_root(to.squares / broadcast(static_cast<float>(size)));
  for (int s = 0; s < kNumSteps; ++s)
    to.scales[s] =
        scale_of<kBits>(select(less(zero, to.squares), one / (rms * broadcast(steps[s])), zero));
}

/// The level of a size: how many steps it is from 0, at most `top`.
inline Vec level_of(Vec size, Vec inverse, Vec top) {
  return to_float(truncate(minimum(size * inverse, top)));
}

/// <y, c> and 4 |c|^2 for every step.
template <int kBits>
inline void try_steps(int size, Tokens& to) {
  if constexpr (kBits == 1) {
    to.products[0] = to.half;
    to.norms[0] = broadcast(static_cast<float>(size));
    return;
  }
  const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
  const Vec top = broadcast(static_cast<float>((1 << (kBits - 1)) - 1));
  Vec parts[kNumSteps][kParts];
  IntVec counts[kNumSteps] = {zero_words(), zero_words(), zero_words()};  // of level 1
  Vec norms[kNumSteps] = {zero, zero, zero};                              // sums of l (l + 1)
  for (int part = 0; part < kParts; ++part) {
    Vec sums[kNumSteps] = {zero, zero, zero};
    for (int j = part; j < size; j += kParts) {
      const Vec value = absolute(load(to.y + j * kLanes));
      for (int s = 0; s < kNumSteps; ++s) {
        if constexpr (kBits == 2) {
          const Mask high = not_less(value, to.scales[s]);
          sums[s] = add_where(high, sums[s], value);
          counts[s] = count_where(high, counts[s]);
        } else {
          const Vec level = level_of(value, to.scales[s], top);
          sums[s] = sums[s] + value * level;
          norms[s] = norms[s] + level * (level + one);
        }
      }
    }
    for (int s = 0; s < kNumSteps; ++s) parts[s][part] = sums[s];
  }
  for (int s = 0; s < kNumSteps; ++s) {
    if constexpr (kBits == 2) norms[s] = to_float(counts[s]) * broadcast(2.0f);
    to.products[s] = to.half + sum_of_parts(parts[s]);
    to.norms[s] = broadcast(static_cast<float>(size)) + broadcast(4.0f) * norms[s];
  }
}

/// Chooses the steps; f and e2 of the tokens.
template <int kBits>
inline void choose_steps(int size, Tokens& tokens, float* factors, float* errors) {
  const Vec zero = broadcast(0.0f), squares = tokens.squares;
  Vec best = broadcast(-1.0f), alike = zero, norms = broadcast(1.0f);
  Vec chosen = scale_of<kBits>(zero);
  for (int s = 0; s < (kBits == 1 ? 1 : kNumSteps); ++s) {
    const Vec product = tokens.products[s], norm = tokens.norms[s];
    const Vec quality = product * product / norm;
    const Mask better = less(best, quality);
    best = select(better, quality, best);
    alike = select(better, product, alike);
    norms = select(better, norm, norms);
    chosen = select(better, tokens.scales[s], chosen);
  }
  const Mask any = less(zero, alike);
  const Vec lost = squares * (norms * broadcast(0.25f)) / (alike * alike) - broadcast(1.0f);
  const Vec error = squares * maximum(lost, zero) / broadcast(static_cast<float>(size - 1));
  tokens.chosen = chosen;
  store(factors, select(any, squares / alike, zero));
  store(errors, select(any, error, zero));
}

/// The tokens' bytes of 8 dimensions in each plane: to [sums][kBits][bytes][64].
///
/// 16 dimensions at a time, of two planes in the halves of a word.
template <int kBits>
inline void write_codes(const Tokens& tokens, int size, int of_sum, uint8_t* to) {
  constexpr int kWords = (kBits + 1) / 2;
  const Vec zero = broadcast(0.0f), chosen = tokens.chosen;
  const Vec top = broadcast(static_cast<float>((1 << (kBits - 1)) - 1));
  const size_t plane = static_cast<size_t>(of_sum / 8) * kSignatureTile;
  for (int j = 0; j < size; j += 16) {
    IntVec words[kWords];
    for (IntVec& word : words) word = zero_words();
    for (int i = 15; i >= 0; --i) {
      const Mask positive = less(zero, load(tokens.y + (j + i) * kLanes));
      const Vec value = absolute(load(tokens.y + (j + i) * kLanes));
      if constexpr (kBits == 1) words[0] = shift_in(words[0], positive, positive);
      if constexpr (kBits == 2) words[0] = shift_in(words[0], positive, less(value, chosen));
      if constexpr (kBits == 4) {
        Vec level = level_of(value, chosen, top);
        const Mask below_4 = less(level, broadcast(4.0f));
        level = level - select(below_4, zero, broadcast(4.0f));
        const Mask below_2 = less(level, broadcast(2.0f));
        level = level - select(below_2, zero, broadcast(2.0f));
        words[0] = shift_in(words[0], positive, below_4);
        words[1] = shift_in(words[1], below_2, less(level, broadcast(1.0f)));
      }
    }
    // A negative value counts down.
    if constexpr (kBits == 4) words[1] = exclusive_or(words[1], low_as_both(words[0]));
    if constexpr (kBits > 1) words[0] = exclusive_or(words[0], low_as_high(words[0]));
    uint8_t* out = to + static_cast<size_t>(j / of_sum * kBits) * plane +
                   static_cast<size_t>(j % of_sum / 8) * kSignatureTile;
    for (int w = 0; w < kWords; ++w) {
      uint8_t* low = out + static_cast<size_t>(2 * w) * plane;
      store_halves(words[w], low, kBits == 1 ? low : low + plane, kSignatureTile);
    }
  }
}

/// F of all tokens at their places, and the end of the header.
inline void write_factors(const SignatureLayout& layout, const float* factors, const float* errors,
                          uint8_t* block) {
  Vec largest_of_lanes = broadcast(0.0f);
  for (int t = 0; t < kSignatureBlock; t += kLanes)
    largest_of_lanes = maximum(load(factors + t), largest_of_lanes);
  float error = errors[0];
  for (int t = 1; t < kSignatureBlock; ++t) error = error + errors[t];
  const float unit = max_lane(largest_of_lanes) / kMostFactor;
  float nearest[kSignatureBlock];
  for (int t = 0; t < kSignatureBlock; t += kLanes) {
    const Vec units = unit > 0.0f ? load(factors + t) / broadcast(unit) : broadcast(0.0f);
    const Vec shift = broadcast(12582912.0f);  // half to even
    store(nearest + t, minimum((units + shift) - shift, broadcast(kMostFactor)));
  }
  for (int t = 0; t < kSignatureBlock; t += 8) {  // so many lie together
    int16_t stored[8];
    for (int i = 0; i < 8; ++i) stored[i] = static_cast<int16_t>(nearest[t + i]);
    uint8_t* end = block + static_cast<size_t>(t / kSignatureTile + 1) * layout.tile_bytes();
    const int place = signature_place(t % kSignatureTile);
    memcpy(end - 2 * kSignatureTile + 2 * place, stored, sizeof stored);
  }
  uint8_t* tail = block + layout.header() + 2 * static_cast<size_t>(layout.head_size);
  memcpy(tail, &unit, sizeof unit);
  memcpy(tail + sizeof unit, &error, sizeof error);
}

template <class Element, int kBits>
inline void encode_block(const SignatureLayout& layout, const float* signs, const uint8_t* keys,
                         size_t stride, uint8_t* block) {
  Tokens tokens;
  float mean[kMaxTransform], factors[kSignatureBlock], errors[kSignatureBlock], steps[kNumSteps];
  const int size = layout.size;
  for (int s = 0; s < kNumSteps; ++s) steps[s] = step_of(kBits, kStepFactors[s]);
  mean_key<Element>(keys, stride, layout.head_size,
                    reinterpret_cast<uint16_t*>(block + layout.header()), mean);
  for (int first = 0; first < kSignatureBlock; first += kLanes) {
    rotate_residuals<Element>(keys + static_cast<size_t>(first) * stride, stride, mean, layout,
                              signs, tokens);
    scale_steps<kBits>(size, steps, tokens);
    try_steps<kBits>(size, tokens);
    choose_steps<kBits>(size, tokens, factors + first, errors + first);
    uint8_t* tile = block + static_cast<size_t>(first / kSignatureTile) * layout.tile_bytes();
    write_codes<kBits>(tokens, size, layout.sum_dimensions(), tile + first % kSignatureTile);
  }
  write_factors(layout, factors, errors, block);
}

template <class Element>
inline void encode_block_of(const SignatureLayout& layout, const float* signs, const uint8_t* keys,
                            size_t stride, uint8_t* block) {
  switch (layout.bits) {
    case 1:
      return encode_block<Element, 1>(layout, signs, keys, stride, block);
    case 2:
      return encode_block<Element, 2>(layout, signs, keys, stride, block);
    default:
      return encode_block<Element, 4>(layout, signs, keys, stride, block);
  }
}

void encode_signatures(const SignatureLayout& layout, RowType type, const float* signs,
                       const uint8_t* keys, size_t stride, uint8_t* block) {
  switch (type) {
    case RowType::float32:
      return encode_block_of<Float32>(layout, signs, keys, stride, block);
    case RowType::bfloat16:
      return encode_block_of<BFloat16>(layout, signs, keys, stride, block);
    case RowType::float16:
      return encode_block_of<Float16>(layout, signs, keys, stride, block);
  }
}
