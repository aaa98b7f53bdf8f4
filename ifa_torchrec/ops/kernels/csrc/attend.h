// attend, forward and backward: one pass over the candidates.
#pragma once

constexpr int64_t MIN_CANDIDATES = 64;  // per partition

// For rows of one request: normalizer = phi z [rows, H] and out = phi S / (normalizer + eps) [rows, Q].
static void read_out(const Shape& s, int64_t rows, const float* phi, const float* state, const float* sum,
                     float eps, float* out, float* normalizer) {
  const int64_t head = s.head();
  for (int h = 0; h < s.H; ++h) {
    gemm<false>(rows, s.dp, head, phi + h * head, s.P, 1, state + h * head * s.dp, s.dp, out + h * s.dp,
                s.Q);
    for (int64_t t = 0; t < rows; ++t) {
      vec product = vec{};
      for (int64_t f = 0; f < head; f += VL)
        product += load(phi + t * s.P + h * head + f) * load(sum + h * head + f);
      const float total = sum_of(product), share = 1.0f / (total + eps);
      normalizer[t * s.H + h] = total;
      float* of_row = out + t * s.Q + h * s.dp;
      for (int j = 0; j < s.dp; j += VL) store(of_row + j, load(of_row + j) * share);
    }
  }
}

IFA_KERNEL(attend)
(const void* candidates, int is_bf16, const int64_t* offsets, int64_t B, const float* query,
 const float* key_value, const float* key_sum, int D, int H, int d, int map, float eps, float* out,
 float* normalizer, int threads) {
  const Shape s(D, H, d, map);
  const Rows all_candidates(offsets, B, MIN_CANDIDATES);
  Floats query_t(D * s.Q);
  transpose_weight(s, query, query_t);

#pragma omp parallel num_threads(threads)
  {
    Floats scratch(TILE * s.Dp), projected(TILE * s.Q), read(TILE * s.Q), phi(TILE * s.P);
    Floats total(TILE * H), padded_state(int64_t(s.P) * s.dp), sum(s.P);
    const float* state = nullptr;

    auto features_of_tile = [&](const Tile& tile) {
      int64_t stride;
      const float* x = tokens_of(s, candidates, is_bf16, tile.row, tile.rows, scratch, &stride);
      gemm<false>(tile.rows, s.Q, D, x, stride, 1, query_t, s.Q, projected, s.Q);
      features(s, tile.rows, projected, phi, nullptr);
    };
    auto read_segment = [&](const Tile&, const Segment& segment) {
      const int64_t from = segment.from;
      if (segment.starts) {
        state = key_value + segment.request * s.state();
        if (s.d != s.dp) {
          pad_state(s, state, padded_state);
          state = padded_state;
        }
        pad_sum(s, key_sum + segment.request * s.sum(), sum);
      }
      read_out(s, segment.count, phi + from * s.P, state, sum, eps, read + from * s.Q, total + from * H);
    };
    auto write_tile = [&](const Tile& tile) {
      for (int64_t t = 0; t < tile.rows; ++t)
        for (int h = 0; h < H; ++h) {
          memcpy(out + ((tile.row + t) * H + h) * d, read + t * s.Q + h * s.dp, d * 4);
          normalizer[(tile.row + t) * H + h] = total[t * H + h];
        }
    };
    all_candidates.each_tile(features_of_tile, read_segment, write_tile);
  }
}

// For out = numerator / (normalizer + eps): the gradients of the numerator, [heads, dp], and of the
// normalizer. `heads` counts the heads of all rows in work, `first` is the index of the first of them.
static void grad_of_quotient(const Shape& s, int64_t first, int64_t heads, const float* grad_out,
                             const float* grad_normalizer, float eps, const float* out,
                             const float* normalizer, float* grad_numerator, float* grad_total) {
  for (int64_t i = 0; i < heads; ++i) {
    float* up = grad_numerator + i * s.dp;
    memcpy(up, grad_out + (first + i) * s.d, s.d * 4);
    for (int j = s.d; j < s.dp; ++j) up[j] = 0;
    vec product = vec{};
    const float share = 1.0f / (normalizer[i] + eps);
    for (int j = 0; j < s.dp; j += VL) {
      store(up + j, load(up + j) * share);
      product += load(up + j) * load(out + i * s.dp + j);
    }
    grad_total[i] = grad_normalizer[first + i] - sum_of(product);
  }
}

IFA_KERNEL(attend_backward)
(const float* grad_out, const float* grad_normalizer, const void* candidates, int is_bf16,
 const int64_t* offsets, int64_t B, const float* query, const float* key_value, const float* key_sum,
 int D, int H, int d, int map, float eps, void* grad_candidates, float* grad_query, float* grad_key_value,
 float* grad_key_sum, int threads) {
  const Shape s(D, H, d, map);
  const Rows all_candidates(offsets, B, MIN_CANDIDATES);
  const int64_t head = s.head();
  Floats query_t(D * s.Q), padded_query(int64_t(s.Q) * s.Dp);
  transpose_weight(s, query, query_t);
  pad_weight(s, query, padded_query);
  WeightSums query_sums(s, all_candidates);
  StateSums sums(all_candidates, grad_key_value, s.state(), grad_key_sum, s.sum());

#pragma omp parallel num_threads(threads)
  {
    const int64_t state_size = int64_t(s.P) * s.dp;
    Floats scratch(TILE * s.Dp), grad_scratch(TILE * s.Dp);
    Floats projected(TILE * s.Q), read(TILE * s.Q), upstream(TILE * s.Q);
    Floats phi(TILE * s.P), grad_phi(TILE * s.P), total(TILE * H), grad_total(TILE * H);
    Floats state(state_size), state_t(state_size), grad_state(state_size), sum(s.P), grad_sum(s.P);
    int64_t stride = 0;
    const float* x = nullptr;
    float* grad_x = nullptr;

    auto features_of_tile = [&](const Tile& tile) {
      x = tokens_of(s, candidates, is_bf16, tile.row, tile.rows, scratch, &stride);
      grad_x = grad_tokens_of(s, grad_candidates, is_bf16, tile.row, grad_scratch);
      gemm<false>(tile.rows, s.Q, D, x, stride, 1, query_t, s.Q, projected, s.Q);
      features(s, tile.rows, projected, phi, nullptr);
    };
    auto start_request = [&](int64_t b) {
      pad_state(s, key_value + b * s.state(), state);
      pad_sum(s, key_sum + b * s.sum(), sum);
      transpose_state(s, state, state_t);
      grad_state.clear();
      grad_sum.clear();
    };
    auto of_segment = [&](const Tile& tile, const Segment& segment) {
      const int64_t from = segment.from, count = segment.count;
      if (segment.starts) start_request(segment.request);
      const float* phi_from = phi + from * s.P;
      read_out(s, count, phi_from, state, sum, eps, read + from * s.Q, total + from * H);
      grad_of_quotient(s, (tile.row + from) * H, count * H, grad_out, grad_normalizer, eps,
                       read + from * s.Q, total + from * H, upstream + from * s.Q, grad_total + from * H);
      float* grad_from = grad_phi + from * s.P;
      for (int h = 0; h < H; ++h) {
        const float* up = upstream + from * s.Q + h * s.dp;
        gemm<true>(head, s.dp, count, phi_from + h * head, 1, s.P, up, s.Q, grad_state + h * head * s.dp,
                   s.dp);
        for (int64_t t = 0; t < count; ++t) {
          const float grad = grad_total[(from + t) * H + h];
          for (int64_t f = h * head; f < (h + 1) * head; f += VL) {
            store(grad_sum + f, load(grad_sum + f) + grad * load(phi_from + t * s.P + f));
            store(grad_from + t * s.P + f, grad * load(sum + f));
          }
        }
        gemm<true>(count, int(head), s.dp, up, s.Q, 1, state_t + h * head * s.dp, head,
                   grad_from + h * head, s.P);
      }
      if (!segment.ends) return;
      float *to_state, *to_sum;
      sums.place(tile.partition, segment.request, &to_state, &to_sum);
      unpad_state(s, grad_state, to_state);
      unpad_sum(s, grad_sum, to_sum);
    };
    auto finish_tile = [&](const Tile& tile) {
      features_backward(s, tile.rows, phi, grad_phi, nullptr, projected);
      gemm<false>(tile.rows, s.Dp, s.Q, projected, s.Q, 1, padded_query, s.Dp, grad_x, s.Dp);
      gemm<true>(s.Q, s.Dp, tile.rows, projected, 1, s.Q, x, stride, query_sums.of(tile.partition), s.Dp);
      write_tokens(s, grad_x, tile.rows, grad_candidates, is_bf16, tile.row);
    };
    all_candidates.each_tile(features_of_tile, of_segment, finish_tile);
    sums.clear_empty();
  }
  sums.add_partials();
  query_sums.add_to(grad_query);
}
