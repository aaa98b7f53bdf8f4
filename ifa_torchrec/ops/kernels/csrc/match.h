// The identity heads' join of a request's candidates with its events, forward and backward.
#pragma once

constexpr int64_t LONG_HISTORY = 16384;  // events from which several threads share a request's sums
constexpr int PARTS = 8;

static inline uint64_t hash_of(int64_t bucket) { return uint64_t(bucket) * 0x9e3779b97f4a7c15u; }

// w_l [L] of one event, from its age only if a is null. a has `columns` entries per event: L, or one for
// all rates.
static inline void rate_weights(int L, const float* a, int columns, const float* ages, const float* decay,
                                int64_t event, float* w) {
  for (int l = 0; l < L; l += VL) {
    float lanes[VL];
    for (int i = 0; i < VL; ++i)
      lanes[i] = ages && l + i < L && decay[l + i] > 0 ? -decay[l + i] * ages[event] : 0.0f;
    if (ages) store(lanes, exp_of(load(lanes)));
    for (int i = 0; i < VL && l + i < L; ++i)
      w[l + i] = (ages ? lanes[i] : 1.0f) * (a ? a[event * columns + (columns > 1 ? l + i : 0)] : 1.0f);
  }
}

// to [D] += weight * from [D]
static inline void add_scaled(int D, float* to, const float* from, float weight) {
  int j = 0;
  for (; j + VL <= D; j += VL) store(to + j, load(to + j) + load(from + j) * weight);
  for (; j < D; ++j) to[j] += from[j] * weight;
}

static inline const float* event_token(int D, const void* history, int is_bf16, int64_t event,
                                       float* scratch) {
  if (!is_bf16) return static_cast<const float*>(history) + event * D;
  const bf16* from = static_cast<const bf16*>(history) + event * D;
  for (int j = 0; j < D; ++j) scratch[j] = float_of(from[j]);
  return scratch;
}

// For each event the first candidate of its request with the same bucket, or -1; for each candidate the
// first one with its own bucket. Both are indices into all candidates.
static void join(const int64_t* buckets, const int64_t* offsets, const int64_t* event_buckets,
                 const int64_t* event_offsets, int64_t B, int64_t* candidate_first,
                 int64_t* event_candidate, int threads) {
  int64_t max_candidates = 0;
  for (int64_t b = 0; b < B; ++b) max_candidates = max(max_candidates, offsets[b + 1] - offsets[b]);
  int max_bits = 2;
  while ((int64_t(1) << max_bits) < 4 * max_candidates) ++max_bits;
#pragma omp parallel num_threads(threads)
  {
    int64_t* row_of = static_cast<int64_t*>(malloc(sizeof(int64_t) << max_bits));
    if (!row_of) abort();
#pragma omp for schedule(dynamic, 8)
    for (int64_t b = 0; b < B; ++b) {
      const int64_t m = offsets[b + 1] - offsets[b];
      int bits = 2;
      while ((int64_t(1) << bits) < 4 * m) ++bits;
      const uint64_t last = (uint64_t(1) << bits) - 1;
      memset(row_of, -1, sizeof(int64_t) << bits);
      for (int64_t row = offsets[b]; row < offsets[b + 1]; ++row) {
        uint64_t place = hash_of(buckets[row]) >> (64 - bits);
        while (row_of[place] >= 0 && buckets[row_of[place]] != buckets[row]) place = (place + 1) & last;
        if (row_of[place] < 0) row_of[place] = row;
        candidate_first[row] = row_of[place];
      }
      for (int64_t event = event_offsets[b]; event < event_offsets[b + 1]; ++event) {
        const int64_t bucket = event_buckets[event];
        uint64_t place = hash_of(bucket) >> (64 - bits);
        while (row_of[place] >= 0 && buckets[row_of[place]] != bucket) place = (place + 1) & last;
        event_candidate[event] = row_of[place];
      }
    }
    free(row_of);
  }
}

IFA_KERNEL(match)
(const int64_t* buckets, const int64_t* offsets, const void* history, int is_bf16,
                  const int64_t* event_buckets, const int64_t* event_offsets, int64_t B, const float* a,
                  int columns, const float* ages, const float* decay, int D, int L, float* token_sum,
                  float* weight_sum, int64_t* candidate_first, int64_t* event_candidate, int threads) {
  join(buckets, offsets, event_buckets, event_offsets, B, candidate_first, event_candidate, threads);
#pragma omp parallel num_threads(threads)
  {
    Floats scratch(D), w(L);
#pragma omp for schedule(dynamic, 8)
    for (int64_t task = 0; task < B * PARTS; ++task) {
      // the parts of a request divide its candidates among them; each part sums in the order of the events
      const int64_t b = task / PARTS, part = task % PARTS;
      const int64_t first = event_offsets[b], last = event_offsets[b + 1];
      const int64_t parts = last - first < LONG_HISTORY ? 1 : PARTS;
      if (part >= parts) continue;
      for (int64_t row = offsets[b]; row < offsets[b + 1]; ++row) {
        if (candidate_first[row] != row || row % parts != part) continue;
        memset(token_sum + row * L * D, 0, int64_t(L) * D * 4);
        memset(weight_sum + row * L, 0, L * 4);
      }
      for (int64_t event = first; event < last; ++event) {
        const int64_t row = event_candidate[event];
        if (row < 0 || row % parts != part) continue;
        rate_weights(L, a, columns, ages, decay, event, w);
        const float* x = event_token(D, history, is_bf16, event, scratch);
        for (int l = 0; l < L; ++l) {
          weight_sum[row * L + l] += w[l];
          add_scaled(D, token_sum + (row * L + l) * D, x, w[l]);
        }
      }
      for (int64_t row = offsets[b]; row < offsets[b + 1]; ++row) {
        const int64_t same = candidate_first[row];
        if (same == row || same % parts != part) continue;
        memcpy(token_sum + row * L * D, token_sum + same * L * D, int64_t(L) * D * 4);
        memcpy(weight_sum + row * L, weight_sum + same * L, L * 4);
      }
    }
  }
}

// Overwrites grad_token [M, L, D] and grad_weight [M, L].
IFA_KERNEL(match_backward)
(float* grad_token, float* grad_weight, int64_t M, int64_t N,
                           const int64_t* candidate_first, const int64_t* event_candidate,
                           const void* history, int is_bf16, const float* a, int columns,
                           const float* ages, const float* decay, int D, int L, void* grad_history,
                           float* grad_a, int threads) {
  // the gradient of a sum is the sum over all candidates that read it
  for (int64_t row = 0; row < M; ++row) {
    const int64_t first = candidate_first[row];
    if (first == row) continue;
    add(grad_token + first * L * D, grad_token + row * L * D, int64_t(L) * D);
    add(grad_weight + first * L, grad_weight + row * L, L);
  }
#pragma omp parallel num_threads(threads)
  {
    Floats scratch(D), grad_x(D), w(L), decayed(L);
#pragma omp for schedule(static)
    for (int64_t event = 0; event < N; ++event) {
      const int64_t row = event_candidate[event];
      float* to = is_bf16 ? grad_x : static_cast<float*>(grad_history) + event * D;
      memset(to, 0, D * 4);
      if (grad_a) memset(grad_a + event * columns, 0, columns * 4);
      if (row >= 0) {
        rate_weights(L, a, columns, ages, decay, event, w);
        for (int l = 0; l < L; ++l) add_scaled(D, to, grad_token + (row * L + l) * D, w[l]);
        if (grad_a) {
          rate_weights(L, nullptr, 1, ages, decay, event, decayed);
          const float* x = event_token(D, history, is_bf16, event, scratch);
          for (int l = 0; l < L; ++l) {
            const float* of_rate = grad_token + (row * L + l) * D;
            float product = grad_weight[row * L + l];
            for (int j = 0; j < D; ++j) product += x[j] * of_rate[j];
            grad_a[event * columns + (columns > 1 ? l : 0)] += product * decayed[l];
          }
        }
      }
      if (is_bf16)
        for (int j = 0; j < D; ++j) static_cast<bf16*>(grad_history)[event * D + j] = bf16_of(to[j]);
    }
  }
}
