// encode, forward and backward: one pass over the events.
#pragma once

constexpr int64_t MIN_EVENTS = 256;  // per partition

// Event weights w_hi [rows, H], from the ages only if a is null. a has `columns` entries per event: H, or
// one for all heads.
static void event_weights(const Shape& s, const float* a, int columns, const float* ages,
                          const float* decay, int64_t first, int64_t rows, float* w) {
  for (int h = 0; h < s.H; ++h) {
    const float* of_head = a ? a + first * columns + (columns > 1 ? h : 0) : nullptr;
    for (int64_t t = 0; t < rows; t += VL) {
      float lanes[VL];
      int count = int(min(VL, rows - t));
      // a rate of 0 means no decay at any age, even an infinite one
      if (ages && decay[h] > 0) {
        for (int i = 0; i < VL; ++i) lanes[i] = i < count ? -decay[h] * ages[first + t + i] : 0.0f;
        store(lanes, exp_of(load(lanes)));
      } else {
        store(lanes, broadcast(1.0f));
      }
      for (int i = 0; i < count; ++i)
        w[(t + i) * s.H + h] = a ? lanes[i] * of_head[(t + i) * columns] : lanes[i];
    }
  }
}

static bool ages_matter(const float* ages, const float* decay, int H) {
  for (int h = 0; ages && h < H; ++h)
    if (decay[h] > 0) return true;
  return false;
}

// sum [P] += the rows of x [rows, P]
static void add_rows(int width, int64_t rows, const float* x, float* sum) {
  for (int j = 0; j < width; j += VL) {
    vec total = vec{};
    for (int64_t t = 0; t < rows; ++t) total += load(x + t * width + j);
    store(sum + j, load(sum + j) + total);
  }
}

// PAIRED: tokens are bfloat16, D is even, and the processor multiplies pairs of bfloat16, twice as fast;
// phi and the key's weight are rounded to bfloat16.
template <bool PAIRED>
static void encode_rows(const Shape& s, const Rows& events, const void* history, int is_bf16,
                        const float* key, const float* value, const float* a, int columns,
                        const float* ages, const float* decay, StateSums& sums, int threads) {
  const int D = s.D, H = s.H;
  Floats key_t(D * s.Q), value_t(D * s.Q), key_pairs(D * s.Q);  // transposed
  transpose_weight(s, key, key_t);
  transpose_weight(s, value, value_t);
  bf16_pair* paired_key = reinterpret_cast<bf16_pair*>(key_pairs.data());
  if (PAIRED) pair_weight(s, key_t, paired_key);
  const bool weighted = a || ages_matter(ages, decay, H);

#pragma omp parallel num_threads(threads)
  {
    Floats scratch(TILE * s.Dp), projected(TILE * s.Q), phi(TILE * s.P), w(TILE * H);
    Floats key_token(int64_t(s.P) * s.Dp);  // sum of w phi(k) x^T
    Floats total(s.P), padded_state(int64_t(s.P) * s.dp), phi_pairs(TILE * s.P), x_pairs(TILE * s.Dp);
    bf16_pair* paired_phi = reinterpret_cast<bf16_pair*>(phi_pairs.data());
    bf16_pair* paired_x = reinterpret_cast<bf16_pair*>(x_pairs.data());
    int64_t stride = 0;
    const float* x = nullptr;

    auto features_of_tile = [&](const Tile& tile) {
      if constexpr (PAIRED) {
        const bf16* tokens = static_cast<const bf16*>(history) + tile.row * D;
        gemm<false, bf16_pair>(tile.rows, s.Q, D / 2, reinterpret_cast<const bf16_pair*>(tokens), D / 2, 1,
                               paired_key, s.Q, projected, s.Q);
      } else {
        x = tokens_of(s, history, is_bf16, tile.row, tile.rows, scratch, &stride);
        gemm<false>(tile.rows, s.Q, D, x, stride, 1, key_t, s.Q, projected, s.Q);
      }
      if (weighted) event_weights(s, a, columns, ages, decay, tile.row, tile.rows, w);
      features(s, tile.rows, projected, phi, weighted ? w.data() : nullptr);
    };
    auto add_segment = [&](const Tile& tile, const Segment& segment) {
      const int64_t count = segment.count;
      const float* phi_from = phi + segment.from * s.P;
      if (segment.starts) {
        total.clear();
        key_token.clear();
      }
      if constexpr (PAIRED) {
        const bf16* tokens = static_cast<const bf16*>(history) + (tile.row + segment.from) * D;
        pair_features(s.P, count, phi_from, paired_phi);
        pair_tokens(s, count, tokens, paired_x);
        gemm<true, bf16_pair>(s.P, s.Dp, (count + 1) / 2, paired_phi, 1, s.P, paired_x, s.Dp, key_token,
                              s.Dp);
      } else {
        gemm<true>(s.P, s.Dp, count, phi_from, 1, s.P, x + segment.from * stride, stride, key_token, s.Dp);
      }
      add_rows(s.P, count, phi_from, total);
      if (!segment.ends) return;
      float *state, *sum;
      sums.place(tile.partition, segment.request, &state, &sum);
      float* whole = s.d == s.dp ? state : padded_state;
      const int64_t head = s.head();
      for (int h = 0; h < H; ++h)
        gemm<false>(head, s.dp, D, key_token + h * head * s.Dp, s.Dp, 1, value_t + h * s.dp, s.Q,
                    whole + h * head * s.dp, s.dp);
      if (whole != state) unpad_state(s, whole, state);
      unpad_sum(s, total, sum);
    };
    events.each_tile(features_of_tile, add_segment, [](const Tile&) {});
    sums.clear_empty();
  }
  sums.add_partials();
}

IFA_KERNEL(encode)
(const void* history, int is_bf16, const int64_t* offsets, int64_t B, const float* key,
 const float* value, const float* a, int columns, const float* ages, const float* decay, int D, int H,
 int d, int map, float* key_value, float* key_sum, int threads) {
  const Shape s(D, H, d, map);
  const Rows events(offsets, B, MIN_EVENTS);
  StateSums sums(events, key_value, s.state(), key_sum, s.sum());
#if IFA_BF16
  if (is_bf16 && D % 2 == 0)
    return encode_rows<true>(s, events, history, 1, key, value, a, columns, ages, decay, sums, threads);
#endif
  encode_rows<false>(s, events, history, is_bf16, key, value, a, columns, ages, decay, sums, threads);
}

// The gradient of a, `columns` entries for each row of a tile, from phi without weights and the gradient
// of phi; decayed is scratch.
static void grad_event_weights(const Shape& s, int columns, const float* ages, const float* decay,
                               const Tile& tile, const float* phi, const float* grad_phi, float* decayed,
                               float* grad_a) {
  const int64_t head = s.head();
  event_weights(s, nullptr, 1, ages, decay, tile.row, tile.rows, decayed);
  memset(grad_a + tile.row * columns, 0, tile.rows * columns * 4);
  for (int64_t t = 0; t < tile.rows; ++t) {
    float* of_row = grad_a + (tile.row + t) * columns;
    for (int h = 0; h < s.H; ++h) {
      vec product = vec{};
      const int64_t at = (t * s.H + h) * head;
      for (int64_t f = 0; f < head; f += VL) product += load(phi + at + f) * load(grad_phi + at + f);
      of_row[columns > 1 ? h : 0] += sum_of(product) * decayed[t * s.H + h];
    }
  }
}

IFA_KERNEL(encode_backward)
(const float* grad_key_value, const float* grad_key_sum, const void* history, int is_bf16,
 const int64_t* offsets, int64_t B, const float* key, const float* value, const float* a, int columns,
 const float* ages, const float* decay, int D, int H, int d, int map, void* grad_history, float* grad_key,
 float* grad_value, float* grad_a, int threads) {
  const Shape s(D, H, d, map);
  const Rows events(offsets, B, MIN_EVENTS);
  const int64_t head = s.head();
  Floats key_t(D * s.Q), padded_key(int64_t(s.Q) * s.Dp), padded_value(int64_t(s.Q) * s.Dp);
  transpose_weight(s, key, key_t);
  pad_weight(s, key, padded_key);
  pad_weight(s, value, padded_value);
  const bool weighted = a || ages_matter(ages, decay, H);
  WeightSums key_sums(s, events), value_sums(s, events);

#pragma omp parallel num_threads(threads)
  {
    const int64_t state_size = int64_t(s.P) * s.dp, token_size = int64_t(s.P) * s.Dp;
    Floats scratch(TILE * s.Dp), grad_scratch(TILE * s.Dp), projected(TILE * s.Q);
    Floats phi(TILE * s.P), weighted_phi(TILE * s.P), grad_phi(TILE * s.P);
    Floats w(TILE * H), decayed(TILE * H);
    Floats key_token(token_size), grad_key_token(token_size), grad_key_token_t(token_size);
    Floats grad_state(state_size), grad_state_t(state_size), grad_total(s.P);
    int64_t stride = 0;
    const float *x = nullptr, *summed = nullptr;  // the tile's tokens, and the features that the state sums
    float* grad_x = nullptr;

    auto features_of_tile = [&](const Tile& tile) {
      x = tokens_of(s, history, is_bf16, tile.row, tile.rows, scratch, &stride);
      grad_x = grad_tokens_of(s, grad_history, is_bf16, tile.row, grad_scratch);
      gemm<false>(tile.rows, s.Q, D, x, stride, 1, key_t, s.Q, projected, s.Q);
      features(s, tile.rows, projected, phi, nullptr);
      summed = phi;
      if (weighted) {
        event_weights(s, a, columns, ages, decay, tile.row, tile.rows, w);
        for (int64_t i = 0; i < tile.rows * H; ++i)
          for (int64_t f = 0; f < head; f += VL)
            store(weighted_phi + i * head + f, load(phi + i * head + f) * w[i]);
        summed = weighted_phi;
      }
    };
    // The gradient of a request's sum of w phi(k) x^T, [P, Dp] and transposed.
    auto start_request = [&](int64_t b) {
      pad_state(s, grad_key_value + b * s.state(), grad_state);
      pad_sum(s, grad_key_sum + b * s.sum(), grad_total);
      transpose_state(s, grad_state, grad_state_t);
      for (int h = 0; h < H; ++h) {
        const float *of_head = padded_value + h * s.dp * s.Dp, *state_t = grad_state_t + h * head * s.dp;
        gemm<false>(head, s.Dp, s.dp, grad_state + h * head * s.dp, s.dp, 1, of_head, s.Dp,
                    grad_key_token + h * head * s.Dp, s.Dp);
        gemm<false>(s.Dp, int(head), s.dp, of_head, 1, s.Dp, state_t, head, grad_key_token_t + h * head,
                    s.P);
      }
    };
    auto of_segment = [&](const Tile& tile, const Segment& segment) {
      const int64_t from = segment.from, count = segment.count;
      const float *x_from = x + from * stride, *sum_from = summed + from * s.P;
      if (segment.starts) start_request(segment.request);
      float* grad_from = grad_phi + from * s.P;
      for (int64_t t = 0; t < count; ++t) memcpy(grad_from + t * s.P, grad_total, s.P * 4);
      gemm<true>(count, s.P, s.Dp, x_from, stride, 1, grad_key_token_t, s.P, grad_from, s.P);
      gemm<false>(count, s.Dp, s.P, sum_from, s.P, 1, grad_key_token, s.Dp, grad_x + from * s.Dp, s.Dp);
      if (segment.starts)
        gemm<false>(s.P, s.Dp, count, sum_from, 1, s.P, x_from, stride, key_token, s.Dp);
      else
        gemm<true>(s.P, s.Dp, count, sum_from, 1, s.P, x_from, stride, key_token, s.Dp);
      if (segment.ends)
        for (int h = 0; h < H; ++h)
          gemm<true>(s.dp, s.Dp, head, grad_state + h * head * s.dp, 1, s.dp, key_token + h * head * s.Dp,
                     s.Dp, value_sums.of(tile.partition) + h * s.dp * s.Dp, s.Dp);
    };
    auto finish_tile = [&](const Tile& tile) {
      if (grad_a) grad_event_weights(s, columns, ages, decay, tile, phi, grad_phi, decayed, grad_a);
      // the projections are not needed any more: their gradient overwrites them
      features_backward(s, tile.rows, phi, grad_phi, weighted ? w.data() : nullptr, projected);
      gemm<true>(tile.rows, s.Dp, s.Q, projected, s.Q, 1, padded_key, s.Dp, grad_x, s.Dp);
      gemm<true>(s.Q, s.Dp, tile.rows, projected, 1, s.Q, x, stride, key_sums.of(tile.partition), s.Dp);
      write_tokens(s, grad_x, tile.rows, grad_history, is_bf16, tile.row);
    };
    events.each_tile(features_of_tile, of_segment, finish_tile);
  }
  key_sums.add_to(grad_key);
  value_sums.add_to(grad_value);
}
