// Blocks of signatures: the exact twin of vllm_magicpig/signature_blocks.py, which has the layout.
//
// Included after sampled_attention.inl in the namespace of each ISA. Every operation is one of
// float32, and sums over dimensions have 16 partial sums, so that all instruction sets write the
// same bytes. Never multiply_add.

constexpr double kStepFactors[] = {0.85, 1.0, 1.15};
constexpr int kNumSteps = 3;

/// The quantiser's step, of the root mean square.
inline float step_of(int bits, double factor) {
  return static_cast<float>((bits == 1 ? 1.0 : bits == 2 ? 0.9957 : 0.335) * factor);
}

/// 16 partial sums over dimensions.
struct Sum16 {
  static constexpr int kParts = 16 / kLanes;
  Vec parts[kParts];

  Sum16() {
    for (Vec& part : parts) part = broadcast(0.0f);
  }
  void add(int j, Vec terms) {
    Vec& part = parts[j / kLanes % kParts];
    part = part + terms;
  }
  float total() const {
    if constexpr (kParts == 2) return sum_lanes(parts[0] + parts[1]);
    return sum_lanes(parts[0]);
  }
};

/// The block's mean as it is stored, and as floats.
template <class Element>
inline void mean_key(const uint8_t* keys, size_t stride, int head_size, uint16_t* stored,
                     float* mean) {
  for_each_vector(head_size, [&](int d, auto lanes) {
    Vec sum = load_row(Element{}, keys + d * Element::kBytes, lanes);
    for (size_t t = 1; t < kSignatureBlock; ++t)
      sum = sum + load_row(Element{}, keys + t * stride + d * Element::kBytes, lanes);
    store(mean + d, sum * broadcast(1.0f / kSignatureBlock), lanes);
  });
  for (int d = 0; d < head_size; ++d) {
    stored[d] = bfloat16_of(mean[d]);
    mean[d] = float_of_bfloat16(stored[d]);
  }
}

/// y = H (signs * y), by vectors of dimensions.
inline void rotate_row(float* y, const float* signs, int size) {
  for (int j = 0; j < size; j += kLanes)
    store(y + j, butterflies_of_lanes(load(y + j) * load(signs + j)));
  transform(y, size / kLanes);
}

/// A key less the mean, rotated: y [size].
template <class Element>
inline void rotated_residual(const uint8_t* key, const float* mean, const SignatureLayout& layout,
                             const float* signs, float* y) {
  for_each_vector(layout.head_size, [&](int d, auto lanes) {
    store(y + d, load_row(Element{}, key + d * Element::kBytes, lanes) - load(mean + d, lanes),
          lanes);
  });
  const size_t left = static_cast<size_t>(layout.size - layout.head_size);
  memset(y + layout.head_size, 0, left * sizeof(float));
  rotate_row(y, signs, layout.size);
  rotate_row(y, signs + layout.size, layout.size);
}

/// The level of a value: how many steps its size is from 0, at most `top`.
inline Vec level_of(Vec size, Vec inverse, Vec top) {
  return to_float(truncate(minimum(size * inverse, top)));
}

/// What is known of kLanes tokens, one in each lane.
struct Tokens {
  float squares[kLanes], half[kLanes];                          // |y|^2, sum of |y_j| / 2
  float inverses[kNumSteps][kLanes];                            // of the steps
  float products[kNumSteps][kLanes], norms[kNumSteps][kLanes];  // <y, c>, 4 |c|^2
  float chosen[kLanes];                                         // the best step's inverse
};

inline void measure(const float* y, int size, int lane, Tokens& to) {
  Sum16 squares, sizes;
  for (int j = 0; j < size; j += kLanes) {
    const Vec value = load(y + j);
    squares.add(j, value * value);
    sizes.add(j, absolute(value));
  }
  to.squares[lane] = squares.total();
  to.half[lane] = sizes.total() * 0.5f;
}

inline void invert_steps(int size, const float* steps, int num_steps, Tokens& to) {
  const Vec zero = broadcast(0.0f), squares = load(to.squares);
  const Vec rms = square_root(squares / broadcast(static_cast<float>(size)));
  for (int s = 0; s < num_steps; ++s)
    store(to.inverses[s],
          select(less(zero, squares), broadcast(1.0f) / (rms * broadcast(steps[s])), zero));
}

/// <y, c> and 4 |c|^2 of one token for every step.
template <int kBits>
inline void try_steps(const float* y, int size, int lane, Tokens& to) {
  if constexpr (kBits == 1) {
    to.products[0][lane] = to.half[lane];
    to.norms[0][lane] = static_cast<float>(size);
    return;
  }
  const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
  const Vec top = broadcast(static_cast<float>((1 << (kBits - 1)) - 1));
  Sum16 product[kNumSteps];
  Vec norm[kNumSteps] = {zero, zero, zero};  // sum of l (l + 1)
  Vec inverse[kNumSteps];
  for (int s = 0; s < kNumSteps; ++s) inverse[s] = broadcast(to.inverses[s][lane]);
  for (int j = 0; j < size; j += kLanes) {
    const Vec value = absolute(load(y + j));
    for (int s = 0; s < kNumSteps; ++s) {
      if constexpr (kBits == 2) {
        const Mask low = less(value * inverse[s], one);
        product[s].add(j, select(low, zero, value));
        norm[s] = norm[s] + select(low, zero, one);
      } else {
        const Vec level = level_of(value, inverse[s], top);
        product[s].add(j, value * level);
        norm[s] = norm[s] + level * (level + one);
      }
    }
  }
  const float each = kBits == 2 ? 8.0f : 4.0f;  // l (l + 1) is 0 or 2 there: it was counted
  for (int s = 0; s < kNumSteps; ++s) {
    to.products[s][lane] = to.half[lane] + product[s].total();
    to.norms[s][lane] = static_cast<float>(size) + each * sum_lanes(norm[s]);
  }
}

/// Chooses the steps; f and e2 of the tokens.
inline void choose_steps(int size, int num_steps, Tokens& tokens, float* factors, float* errors) {
  const Vec zero = broadcast(0.0f), squares = load(tokens.squares);
  Vec best = broadcast(-1.0f), alike = zero, norms = broadcast(1.0f), chosen = zero;
  for (int s = 0; s < num_steps; ++s) {
    const Vec product = load(tokens.products[s]), norm = load(tokens.norms[s]);
    const Vec quality = product * product / norm;
    const Mask better = less(best, quality);
    best = select(better, quality, best);
    alike = select(better, product, alike);
    norms = select(better, norm, norms);
    chosen = select(better, load(tokens.inverses[s]), chosen);
  }
  const Mask any = less(zero, alike);
  const Vec lost = squares * (norms * broadcast(0.25f)) / (alike * alike) - broadcast(1.0f);
  const Vec error = squares * maximum(lost, zero) / broadcast(static_cast<float>(size - 1));
  store(tokens.chosen, chosen);
  store(factors, select(any, squares / alike, zero));
  store(errors, select(any, error, zero));
}

/// One token's byte of 8 dimensions in each plane: to [sums][kBits][bytes][64].
template <int kBits>
inline void write_codes(const float* y, int size, int of_sum, float chosen, uint8_t* to) {
  const Vec zero = broadcast(0.0f), inverse = broadcast(chosen);
  const Vec top = broadcast(static_cast<float>((1 << (kBits - 1)) - 1));
  const size_t plane = static_cast<size_t>(of_sum / 8) * kSignatureTile;
  for (int j = 0; j < size; j += kLanes) {
    const Vec value = load(y + j);
    uint32_t bits[kBits];
    bits[0] = bits_of(less(zero, value));
    if constexpr (kBits > 1) {
      Vec level = level_of(absolute(value), inverse, top);
      for (int k = 1; k < kBits; ++k) {
        const Vec weight = broadcast(static_cast<float>(1 << (kBits - 1 - k)));
        const Mask clear = less(level, weight);
        level = level - select(clear, zero, weight);
        bits[k] = bits_of(clear) ^ bits[0];  // a negative value counts down
      }
    }
    uint8_t* out = to + static_cast<size_t>(j / of_sum * kBits) * plane +
                   static_cast<size_t>(j % of_sum / 8) * kSignatureTile;
    for (int byte = 0; byte < kLanes / 8; ++byte)
      for (int k = 0; k < kBits; ++k)
        out[static_cast<size_t>(k) * plane + static_cast<size_t>(byte) * kSignatureTile] =
            static_cast<uint8_t>(bits[k] >> 8 * byte);
  }
}

/// F of all tokens at their places, and the end of the header.
inline void write_factors(const SignatureLayout& layout, const float* factors, const float* errors,
                          uint8_t* block) {
  float largest = 0.0f, error = errors[0];
  for (int t = 0; t < kSignatureBlock; ++t) largest = factors[t] > largest ? factors[t] : largest;
  for (int t = 1; t < kSignatureBlock; ++t) error = error + errors[t];
  const float unit = largest / kMostFactor;
  for (int t = 0; t < kSignatureBlock; ++t) {
    const float units = unit > 0.0f ? factors[t] / unit : 0.0f;
    const float nearest = (units + 12582912.0f) - 12582912.0f;  // half to even
    const int16_t stored = static_cast<int16_t>(nearest < kMostFactor ? nearest : kMostFactor);
    uint8_t* end = block + static_cast<size_t>(t / kSignatureTile + 1) * layout.tile_bytes();
    const int place = signature_place(t % kSignatureTile);
    memcpy(end - 2 * kSignatureTile + 2 * place, &stored, sizeof stored);
  }
  uint8_t* tail = block + layout.header() + 2 * static_cast<size_t>(layout.head_size);
  memcpy(tail, &unit, sizeof unit);
  memcpy(tail + sizeof unit, &error, sizeof error);
}

template <class Element, int kBits>
inline void encode_block(const SignatureLayout& layout, const float* signs, const uint8_t* keys,
                         size_t stride, uint8_t* block) {
  alignas(64) float y[kLanes][kMaxTransform];
  float mean[kMaxTransform], factors[kSignatureBlock], errors[kSignatureBlock], steps[kNumSteps];
  const int size = layout.size, num_steps = kBits == 1 ? 1 : kNumSteps;
  for (int s = 0; s < kNumSteps; ++s) steps[s] = step_of(kBits, kStepFactors[s]);
  mean_key<Element>(keys, stride, layout.head_size,
                    reinterpret_cast<uint16_t*>(block + layout.header()), mean);
  Tokens tokens;
  for (int first = 0; first < kSignatureBlock; first += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      rotated_residual<Element>(keys + static_cast<size_t>(first + lane) * stride, mean, layout,
                                signs, y[lane]);
      measure(y[lane], size, lane, tokens);
    }
    invert_steps(size, steps, num_steps, tokens);
    for (int lane = 0; lane < kLanes; ++lane) try_steps<kBits>(y[lane], size, lane, tokens);
    choose_steps(size, num_steps, tokens, factors + first, errors + first);
    uint8_t* tile = block + static_cast<size_t>(first / kSignatureTile) * layout.tile_bytes();
    for (int lane = 0; lane < kLanes; ++lane)
      write_codes<kBits>(y[lane], size, layout.sum_dimensions(), tokens.chosen[lane],
                         tile + first % kSignatureTile + lane);
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
