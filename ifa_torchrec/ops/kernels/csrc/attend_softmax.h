// attend_softmax, forward and backward: one pass over the candidates.
#pragma once

// A request's summaries mu of all heads, in the layout of the matrix products: R padded to Rp, d to dp.
struct Summaries {
  const Shape& s;
  const int R, Rp;
  Floats rows, columns, log_weight;  // [H, Rp, dp], [H, dp, Rp], [H, Rp]

  Summaries(const Shape& s, int R)
      : s(s), R(R), Rp(padded(R)), rows(int64_t(s.H) * Rp * s.dp), columns(int64_t(s.H) * Rp * s.dp),
        log_weight(int64_t(s.H) * Rp) {
    rows.clear();
    columns.clear();
    for (int i = 0; i < s.H * Rp; ++i) log_weight[i] = -__builtin_inff();  // padding is absent
  }

  void read(const float* mean, const float* weight) {
    for (int h = 0; h < s.H; ++h)
      for (int r = 0; r < R; ++r) {
        const float* from = mean + (int64_t(h) * R + r) * s.d;
        float *row = rows + (int64_t(h) * Rp + r) * s.dp, *column = columns + int64_t(h) * s.dp * Rp + r;
        memcpy(row, from, s.d * 4);
        for (int j = 0; j < s.d; ++j) column[j * Rp] = from[j];
        log_weight[h * Rp + r] = weight[h * R + r];
      }
  }
};

// Replaces scores [n] by their softmax, in place; returns the logarithm of the sum of the exponentials.
static float softmax(int n, float* score) {
  vec most = load(score);
  for (int j = VL; j < n; j += VL) {
    vec value = load(score + j);
    most = value > most ? value : most;
  }
  const float highest = max_of(most);
  const float shift = highest > -__builtin_inff() ? highest : 0.0f;  // a NaN stays NaN in the sum
  vec sum = vec{};
  for (int j = 0; j < n; j += VL) {
    vec value = exp_of(load(score + j) - shift);
    store(score + j, value);
    sum += value;
  }
  const float total = sum_of(sum), share = total == 0.0f ? 0.0f : 1.0f / total;
  for (int j = 0; j < n; j += VL) store(score + j, load(score + j) * share);
  return shift + __builtin_logf(total);
}

// For rows of one request with queries [rows, Q], already divided by sqrt(d): the softmax weights
// `share` [rows, H, Rp], out [rows, Q] and log_sum [rows, H].
static void read_summaries(const Shape& s, const Summaries& of, int64_t rows, const float* query,
                           float* share, float* out, float* log_sum) {
  const int64_t stride = int64_t(s.H) * of.Rp;
  for (int h = 0; h < s.H; ++h) {
    const int64_t head = int64_t(h) * of.Rp * s.dp;
    gemm<false>(rows, of.Rp, s.dp, query + h * s.dp, s.Q, 1, of.columns + head, of.Rp, share + h * of.Rp,
                stride);
    for (int64_t t = 0; t < rows; ++t) {
      float* score = share + t * stride + h * of.Rp;
      for (int r = 0; r < of.Rp; r += VL) store(score + r, load(score + r) + load(of.log_weight + h * of.Rp + r));
      log_sum[t * s.H + h] = softmax(of.Rp, score);
    }
    gemm<false>(rows, s.dp, of.Rp, share + h * of.Rp, stride, 1, of.rows + head, s.dp, out + h * s.dp, s.Q);
  }
}

static void scale(int64_t count, float factor, float* x) {
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

IFA_KERNEL(attend_softmax)
(const void* candidates, int is_bf16, const int64_t* offsets, int64_t B, const float* query,
 const float* mean, const float* log_weight, int D, int H, int d, int R, float* out, float* log_sum,
 int threads) {
  const Shape s(D, H, d, RELU);
  const Rows all_candidates(offsets, B, MIN_CANDIDATES);
  Floats query_t(D * s.Q);
  transpose_weight(s, query, query_t);
  scale(int64_t(D) * s.Q, 1.0f / __builtin_sqrtf(float(d)), query_t);

#pragma omp parallel num_threads(threads)
  {
    Summaries summaries(s, R);
    Floats scratch(TILE * s.Dp), projected(TILE * s.Q), read(TILE * s.Q);
    Floats share(int64_t(TILE) * H * summaries.Rp);

    auto queries_of_tile = [&](const Tile& tile) {
      int64_t stride;
      const float* x = tokens_of(s, candidates, is_bf16, tile.row, tile.rows, scratch, &stride);
      gemm<false>(tile.rows, s.Q, D, x, stride, 1, query_t, s.Q, projected, s.Q);
    };
    auto read_segment = [&](const Tile& tile, const Segment& segment) {
      if (segment.starts)
        summaries.read(mean + segment.request * H * R * d, log_weight + segment.request * H * R);
      read_summaries(s, summaries, segment.count, projected + segment.from * s.Q, share,
                     read + segment.from * s.Q, log_sum + (tile.row + segment.from) * H);
    };
    auto write_tile = [&](const Tile& tile) {
      for (int64_t t = 0; t < tile.rows; ++t)
        for (int h = 0; h < H; ++h)
          memcpy(out + ((tile.row + t) * H + h) * d, read + t * s.Q + h * s.dp, d * 4);
    };
    all_candidates.each_tile(queries_of_tile, read_segment, write_tile);
  }
}

// Replaces the gradients of the softmax weights [n] by those of the scores, with log_sum's added.
static void grad_of_softmax(int n, const float* share, float grad_log_sum, float* grad) {
  vec product = vec{};
  for (int j = 0; j < n; j += VL) product += load(grad + j) * load(share + j);
  const float constant = grad_log_sum - sum_of(product);
  for (int j = 0; j < n; j += VL) store(grad + j, (load(grad + j) + constant) * load(share + j));
}

IFA_KERNEL(attend_softmax_backward)
(const float* grad_out, const float* grad_log_sum, const void* candidates, int is_bf16,
 const int64_t* offsets, int64_t B, const float* query, const float* mean, const float* log_weight, int D,
 int H, int d, int R, void* grad_candidates, float* grad_query, float* grad_mean, float* grad_log_weight,
 int threads) {
  const Shape s(D, H, d, RELU);
  const Rows all_candidates(offsets, B, MIN_CANDIDATES);
  const float root = 1.0f / __builtin_sqrtf(float(d));
  Floats query_t(D * s.Q), padded_query(int64_t(s.Q) * s.Dp);
  transpose_weight(s, query, query_t);
  scale(int64_t(D) * s.Q, root, query_t);
  pad_weight(s, query, padded_query);
  WeightSums query_sums(s, all_candidates);
  StateSums sums(all_candidates, grad_mean, int64_t(H) * R * d, grad_log_weight, int64_t(H) * R);

#pragma omp parallel num_threads(threads)
  {
    Summaries summaries(s, R);
    const int Rp = summaries.Rp;
    const int64_t row = int64_t(H) * Rp;  // floats in a row of `share`
    Floats scratch(TILE * s.Dp), grad_scratch(TILE * s.Dp), projected(TILE * s.Q), read(TILE * s.Q);
    Floats upstream(TILE * s.Q), grad_projected(TILE * s.Q), total(TILE * H);
    Floats share(TILE * row), grad_score(TILE * row), grad_rows(row * s.dp), grad_weight(row);
    int64_t stride = 0;
    const float* x = nullptr;
    float* grad_x = nullptr;

    auto queries_of_tile = [&](const Tile& tile) {
      x = tokens_of(s, candidates, is_bf16, tile.row, tile.rows, scratch, &stride);
      grad_x = grad_tokens_of(s, grad_candidates, is_bf16, tile.row, grad_scratch);
      gemm<false>(tile.rows, s.Q, D, x, stride, 1, query_t, s.Q, projected, s.Q);
      upstream.clear();
      for (int64_t i = 0; i < tile.rows * H; ++i)
        memcpy(upstream + i * s.dp, grad_out + (tile.row * H + i) * d, d * 4);
    };
    auto of_segment = [&](const Tile& tile, const Segment& segment) {
      const int64_t from = segment.from, count = segment.count;
      if (segment.starts) {
        summaries.read(mean + segment.request * H * R * d, log_weight + segment.request * H * R);
        grad_rows.clear();
        grad_weight.clear();
      }
      const float* q = projected + from * s.Q;
      read_summaries(s, summaries, count, q, share, read, total);
      for (int h = 0; h < H; ++h) {
        const int64_t head = int64_t(h) * Rp * s.dp;
        const float* up = upstream + from * s.Q + h * s.dp;
        float *of_share = share + h * Rp, *of_score = grad_score + h * Rp, *to = grad_rows + head;
        gemm<false>(count, Rp, s.dp, up, s.Q, 1, summaries.columns + head, Rp, of_score, row);
        for (int64_t t = 0; t < count; ++t) {
          float* grad = of_score + t * row;
          grad_of_softmax(Rp, of_share + t * row, grad_log_sum[(tile.row + from + t) * H + h], grad);
          add(grad_weight + h * Rp, grad, Rp);
        }
        gemm<true>(Rp, s.dp, count, of_share, 1, row, up, s.Q, to, s.dp);
        gemm<true>(Rp, s.dp, count, of_score, 1, row, q + h * s.dp, s.Q, to, s.dp);
        gemm<false>(count, s.dp, Rp, of_score, row, 1, summaries.rows + head, s.dp,
                    grad_projected + from * s.Q + h * s.dp, s.Q);
      }
      if (!segment.ends) return;
      float *to_mean, *to_weight;
      sums.place(tile.partition, segment.request, &to_mean, &to_weight);
      for (int h = 0; h < H; ++h) {
        for (int r = 0; r < R; ++r)
          memcpy(to_mean + (int64_t(h) * R + r) * d, grad_rows + (int64_t(h) * Rp + r) * s.dp, d * 4);
        memcpy(to_weight + int64_t(h) * R, grad_weight + h * Rp, R * 4);
      }
    };
    auto finish_tile = [&](const Tile& tile) {
      scale(tile.rows * s.Q, root, grad_projected);
      gemm<false>(tile.rows, s.Dp, s.Q, grad_projected, s.Q, 1, padded_query, s.Dp, grad_x, s.Dp);
      gemm<true>(s.Q, s.Dp, tile.rows, grad_projected, 1, s.Q, x, stride, query_sums.of(tile.partition),
                 s.Dp);
      write_tokens(s, grad_x, tile.rows, grad_candidates, is_bf16, tile.row);
    };
    all_candidates.each_tile(queries_of_tile, of_segment, finish_tile);
    sums.clear_empty();
  }
  sums.add_partials();
  query_sums.add_to(grad_query);
}
