// encode and attend, forward and backward: one pass over the rows, in tiles that stay in cache.
//
// Letters as in ops/__init__.py. Inside, the features of a head are padded to whole vectors: a head
// has dp >= d columns, its phi e * dp (e = 2 for hedgehog, whose halves are padded each), all heads
// Q = H * dp projections and P = H * e * dp features; a token has Dp >= D columns. Padding is zero.
#pragma once

enum Map { ELU = 0, RELU = 1, HEDGEHOG = 2 };

constexpr int TILE = 64;         // rows in work at a time
constexpr int MOST_SLOTS = 128;  // parts of the rows that threads take; not by their number, so
constexpr int LEAST_ROWS = 256;  // that results do not depend on how many there are

struct Shape {
  int D, H, d, map;
  int Dp, dp, e, Q, P;
  Shape(int D, int H, int d, int map) : D(D), H(H), d(d), map(map) {
    Dp = padded(D), dp = padded(d), e = map == HEDGEHOG ? 2 : 1;
    Q = H * dp, P = Q * e;
  }
  int features() const { return e * d; }                        // d_phi
  int64_t state() const { return int64_t(H) * features() * d; }  // of S of one request
};

// Memory of a thread, given in pieces that begin on a cache line.
struct Arena {
  char *memory, *next;
  explicit Arena(int64_t floats) {
    memory = static_cast<char*>(aligned_alloc(64, floats * 4));
    if (!memory) abort();
    next = memory;
  }
  ~Arena() { free(memory); }
  static int64_t size(int64_t floats) { return (floats + 15) / 16 * 16; }
  float* floats(int64_t count) {
    float* result = reinterpret_cast<float*>(next);
    next += size(count) * 4;
    return result;
  }
  float* zeros(int64_t count) {
    float* result = floats(count);
    memset(result, 0, count * 4);
    return result;
  }
  Arena(const Arena&) = delete;
};

static int slots_of(int64_t rows) { return int(larger(1, smaller(MOST_SLOTS, rows / LEAST_ROWS))); }

// The request that row belongs to: the last one that begins at or before it and is not empty.
static int64_t request_of(const int64_t* offsets, int64_t B, int64_t row) {
  int64_t low = 0, high = B;  // offsets[low] <= row < offsets[high]
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    (offsets[middle] <= row ? low : high) = middle;
  }
  return low;
}

// ---------------------------------------------------------------------------------- tokens, weights

// Rows of tokens as floats, Dp columns: where they lie, if they can be used so.
static const float* tokens_of(const Shape& s, const void* x, bool is_bf16, int64_t first, int64_t rows,
                              float* scratch, int64_t* stride) {
  if (!is_bf16 && s.D == s.Dp) {
    *stride = s.D;
    return static_cast<const float*>(x) + first * s.D;
  }
  *stride = s.Dp;
  for (int64_t t = 0; t < rows; ++t) {
    float* to = scratch + t * s.Dp;
    if (is_bf16) {
      const bf16* from = static_cast<const bf16*>(x) + (first + t) * s.D;
      for (int j = 0; j < s.D; ++j) to[j] = float_of(from[j]);
    } else {
      memcpy(to, static_cast<const float*>(x) + (first + t) * s.D, s.D * 4);
    }
    for (int j = s.D; j < s.Dp; ++j) to[j] = 0;
  }
  return scratch;
}

// Where to put the gradient of rows of tokens, Dp columns: to its place, if it can be written so.
static float* grad_tokens_of(const Shape& s, void* grad, bool is_bf16, int64_t first, float* scratch) {
  return !is_bf16 && s.D == s.Dp ? static_cast<float*>(grad) + first * s.D : scratch;
}

static void write_tokens(const Shape& s, const float* from, int64_t rows, void* x, bool is_bf16,
                         int64_t first) {
  if (!is_bf16 && s.D == s.Dp) return;  // see grad_tokens_of
  for (int64_t t = 0; t < rows; ++t, from += s.Dp) {
    if (is_bf16) {
      bf16* to = static_cast<bf16*>(x) + (first + t) * s.D;
      for (int j = 0; j < s.D; ++j) to[j] = bf16_of(from[j]);
    } else {
      memcpy(static_cast<float*>(x) + (first + t) * s.D, from, s.D * 4);
    }
  }
}

// A projection's weight [H, d, D], padded: as it is [Q, Dp], and turned round [D, Q].
static void pad_weight(const Shape& s, const float* weight, float* padded_weight) {
  for (int h = 0; h < s.H; ++h)
    for (int i = 0; i < s.d; ++i)
      memcpy(padded_weight + (h * s.dp + i) * s.Dp, weight + (h * s.d + i) * s.D, s.D * 4);
}

static void turn_weight(const Shape& s, const float* weight, float* turned) {
  for (int h = 0; h < s.H; ++h)
    for (int i = 0; i < s.d; ++i)
      for (int j = 0; j < s.D; ++j) turned[j * s.Q + h * s.dp + i] = weight[(h * s.d + i) * s.D + j];
}

// Event weights w_hi [rows, H], of the ages alone where a is null.
static void event_weights(const Shape& s, const float* a, const float* ages, const float* decay,
                          int64_t first, int64_t rows, float* w) {
  for (int h = 0; h < s.H; ++h) {
    for (int64_t t = 0; t < rows; t += VL) {
      float lanes[VL];
      int count = int(smaller(VL, rows - t));
      // no decay is no decay at any age, an infinite one included
      if (ages && decay[h] > 0) {
        for (int i = 0; i < VL; ++i) lanes[i] = i < count ? -decay[h] * ages[first + t + i] : 0.0f;
        store(lanes, exp_of(load(lanes)));
      } else {
        store(lanes, all(1.0f));
      }
      for (int i = 0; i < count; ++i) w[(t + i) * s.H + h] = a ? lanes[i] * a[first + t + i] : lanes[i];
    }
  }
}

static bool ages_matter(const float* ages, const float* decay, int H) {
  for (int h = 0; ages && h < H; ++h)
    if (decay[h] > 0) return true;
  return false;
}

// ------------------------------------------------------------------------------------- feature maps

// phi [rows, P] of the projections [rows, Q], each head's times w[row, head] if w is given.
static void features(const Shape& s, int64_t rows, float* projected, float* phi, const float* w) {
  // All bits where the last vector of a head holds a feature, none where padding: of an infinite token
  // the padding is NaN, which no product with zero would take away.
  ivec last = ivec{};
  for (int j = 0; j < VL; ++j) last[j] = s.dp - VL + j < s.d ? -1 : 0;
  const int whole = s.dp - VL;
  if (s.map != HEDGEHOG) {
    for (int64_t i = 0; i < rows * s.H; ++i) {
      const float* x = projected + i * s.dp;
      float* y = phi + i * s.dp;
      for (int j = 0; j < s.dp; j += VL) {
        vec value = load(x + j), none = vec{};
        vec result = none > value ? none : value;  // in this order a NaN stays
        if (s.map == ELU) result += exp_of(value < none ? value : none);
        if (j == whole) result = (vec)((ivec)result & last);
        store(y + j, w ? result * w[i] : result);
      }
    }
    return;
  }
  // Softmax over x and over -x. Where all |x| are below 80 nothing need be subtracted first: exp
  // and its inverse are far from the ends of float, and one exp serves both.
  vec most = vec{};
  for (int64_t i = 0; i < rows * s.Q; i += VL) {
    vec value = load(projected + i);
    value = value < vec{} ? -value : value;
    most = value > most ? value : most;  // not a NaN: its head comes out NaN either way
  }
  bool tame = largest_of(most) < 80.0f;
  for (int64_t i = 0; i < rows * s.H; ++i) {
    float* x = projected + i * s.dp;
    float* y = phi + i * 2 * s.dp;
    float high = 0, low = 0;
    if (!tame) {
      high = low = x[0];
      for (int j = 1; j < s.d; ++j) {
        high = x[j] > high ? x[j] : high;
        low = x[j] < low ? x[j] : low;
      }
    }
    vec up = vec{}, down = vec{};
    for (int j = 0; j < s.dp; j += VL) {
      vec value = load(x + j), rising = exp_of(value - high);
      vec falling = tame ? 1.0f / rising : exp_of(low - value);
      if (j == whole) {
        rising = (vec)((ivec)rising & last);
        falling = (vec)((ivec)falling & last);
      }
      store(y + j, rising);
      store(y + s.dp + j, falling);
      up += rising;
      down += falling;
    }
    float weight = w ? w[i] : 1.0f;
    float share_up = weight / sum_of(up), share_down = weight / sum_of(down);
    for (int j = 0; j < s.dp; j += VL) {
      store(y + j, load(y + j) * share_up);
      store(y + s.dp + j, load(y + s.dp + j) * share_down);
    }
  }
}

// The gradient [rows, Q] of the projections, from that of phi [rows, P]; phi without weights.
// grad_phi is multiplied by w[row, head] if w is given.
static void features_backward(const Shape& s, int64_t rows, const float* phi, const float* grad_phi,
                              const float* w, float* grad_projected) {
  for (int64_t i = 0; i < rows * s.H; ++i) {
    const float *y = phi + i * s.e * s.dp, *g = grad_phi + i * s.e * s.dp;
    float* to = grad_projected + i * s.dp;
    const float weight = w ? w[i] : 1.0f;
    if (s.map == HEDGEHOG) {
      vec up = vec{}, down = vec{};
      for (int j = 0; j < s.dp; j += VL) {
        up += load(g + j) * load(y + j);
        down += load(g + s.dp + j) * load(y + s.dp + j);
      }
      float mean_up = sum_of(up), mean_down = sum_of(down);
      for (int j = 0; j < s.dp; j += VL) {
        vec rising = load(y + j) * (load(g + j) - mean_up);
        vec falling = load(y + s.dp + j) * (load(g + s.dp + j) - mean_down);
        store(to + j, (rising - falling) * weight);
      }
      continue;
    }
    for (int j = 0; j < s.dp; j += VL) {
      vec value = load(y + j), one = all(1.0f), none = vec{};
      vec slope = s.map == ELU ? (value < one ? value : one) : (value > none ? one : none);
      store(to + j, load(g + j) * slope * weight);
    }
  }
}

// ------------------------------------------------------------------------------------------- states

// A request's S, as the caller has it [H, e d, d], and with padding [H, e dp, dp].
static void pad_state(const Shape& s, const float* state, float* padded_state) {
  for (int block = 0; block < s.H * s.e; ++block)
    for (int f = 0; f < s.dp; ++f) {
      float* to = padded_state + (block * s.dp + f) * s.dp;
      for (int j = 0; j < s.dp; ++j)
        to[j] = f < s.d && j < s.d ? state[(block * s.d + f) * s.d + j] : 0.0f;
    }
}

// Each head's part of a padded state [e dp, dp] turned round, [dp, e dp].
static void turn_state(const Shape& s, const float* state, float* turned) {
  const int64_t head = int64_t(s.e) * s.dp;
  for (int h = 0; h < s.H; ++h, state += head * s.dp, turned += head * s.dp)
    for (int64_t f = 0; f < head; ++f)
      for (int j = 0; j < s.dp; ++j) turned[j * head + f] = state[f * s.dp + j];
}

static void unpad_state(const Shape& s, const float* padded_state, float* state) {
  for (int block = 0; block < s.H * s.e; ++block)
    for (int f = 0; f < s.d; ++f)
      memcpy(state + (block * s.d + f) * s.d, padded_state + (block * s.dp + f) * s.dp, s.d * 4);
}

static void pad_sum(const Shape& s, const float* sum, float* padded_sum) {
  for (int block = 0; block < s.H * s.e; ++block)
    for (int f = 0; f < s.dp; ++f) padded_sum[block * s.dp + f] = f < s.d ? sum[block * s.d + f] : 0.0f;
}

static void unpad_sum(const Shape& s, const float* padded_sum, float* sum) {
  for (int block = 0; block < s.H * s.e; ++block)
    memcpy(sum + block * s.d, padded_sum + block * s.dp, s.d * 4);
}

// sum [P] += the rows of x [rows, P]
static void add_rows(int width, int64_t rows, const float* x, float* sum) {
  for (int j = 0; j < width; j += VL) {
    vec total = vec{};
    for (int64_t t = 0; t < rows; ++t) total += load(x + t * width + j);
    store(sum + j, load(sum + j) + total);
  }
}

static void add(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// What a slot sums for a request that began in an earlier slot waits here, and is added at the end,
// slot by slot: the order, and so the result, is the same with any number of threads.
struct Partials {
  int64_t each;
  float* values;
  int64_t* request;  // -1: none
  Partials(int slots, int64_t each) : each(each) {
    values = static_cast<float*>(malloc(larger(1, slots * each) * 4));
    request = static_cast<int64_t*>(malloc(slots * sizeof(int64_t)));
    if (!values || !request) abort();
    for (int i = 0; i < slots; ++i) request[i] = -1;
  }
  ~Partials() {
    free(values);
    free(request);
  }
  Partials(const Partials&) = delete;
  void add_to(int slots, float* state, int64_t state_size, float* sum, int64_t sum_size) const {
    for (int i = 0; i < slots; ++i) {
      if (request[i] < 0) continue;
      add(state + request[i] * state_size, values + i * each, state_size);
      add(sum + request[i] * sum_size, values + i * each + state_size, sum_size);
    }
  }
};

// --------------------------------------------------------------------------------- pairs of bfloat16

#if IFA_BF16
// weight turned round [D, Q], as pairs of rows [D / 2, Q].
static void pair_weight(const Shape& s, const float* turned, bf16_pair* pairs) {
  for (int i = 0; i < s.D / 2; ++i)
    for (int j = 0; j < s.Q; ++j)
      pairs[i * s.Q + j] = bf16_of(turned[2 * i * s.Q + j]) | uint32_t(bf16_of(turned[(2 * i + 1) * s.Q + j])) << 16;
}

// phi [rows, P], as pairs of rows [rows / 2, P]; behind an odd last row stand zeros.
static void pair_features(int P, int64_t rows, const float* phi, bf16_pair* pairs) {
  for (int64_t t = 0; t < rows; t += 2)
    for (int f = 0; f < P; f += VL) {
      uvec second = t + 1 < rows ? bf16_bits_of(load(phi + (t + 1) * P + f)) : uvec{};
      store(pairs + t / 2 * P + f, bf16_bits_of(load(phi + t * P + f)) | second << 16);
    }
}

// Tokens [rows, D], as pairs of rows [rows / 2, Dp].
static void pair_tokens(const Shape& s, int64_t rows, const bf16* x, bf16_pair* pairs) {
  for (int64_t t = 0; t < rows; t += 2) {
    const bf16 *one = x + t * s.D, *two = t + 1 < rows ? one + s.D : nullptr;
    bf16_pair* to = pairs + t / 2 * s.Dp;
    int j = 0;
    for (; j + VL <= s.D; j += VL) {
      uvec first = __builtin_convertvector(*reinterpret_cast<const bf16_vec*>(one + j), uvec);
      uvec second = two ? __builtin_convertvector(*reinterpret_cast<const bf16_vec*>(two + j), uvec) : uvec{};
      store(to + j, first | second << 16);
    }
    for (; j < s.Dp; ++j) to[j] = j < s.D ? one[j] | uint32_t(two ? two[j] : 0) << 16 : 0;
  }
}
#endif

// What no row adds to is zero. Of each thread of a parallel region.
static void clear_empty(const int64_t* offsets, int64_t B, float* state, int64_t state_size, float* sum,
                        int64_t sum_size) {
#pragma omp for
  for (int64_t b = 0; b < B; ++b)
    if (offsets[b] == offsets[b + 1]) {
      memset(state + b * state_size, 0, state_size * 4);
      memset(sum + b * sum_size, 0, sum_size * 4);
    }
}

// ------------------------------------------------------------------------------------------- encode

IFA_KERNEL(encode)
(const void* history, int is_bf16, const int64_t* offsets, int64_t B, const float* key,
                   const float* value, const float* a, const float* ages, const float* decay, int D,
                   int H, int d, int map, float* key_value, float* key_sum, int threads) {
  const Shape s(D, H, d, map);
  const int64_t N = offsets[B], sums = int64_t(H) * s.features();
  const int slots = slots_of(N);
  Arena weights(Arena::size(D * s.Q) * 2);
  float* turned_key = weights.zeros(D * s.Q);
  float* turned_value = weights.zeros(D * s.Q);
  turn_weight(s, key, turned_key);
  turn_weight(s, value, turned_value);
  const bool weighted = a || ages_matter(ages, decay, H);
  Partials partials(slots, s.state() + sums);
#if IFA_BF16
  // Products of bfloat16 go twice as fast; phi and the key's weight are rounded to it.
  const bool paired = is_bf16 && D % 2 == 0;
  Arena of_pairs(Arena::size(D * s.Q));
  bf16_pair* paired_key = reinterpret_cast<bf16_pair*>(of_pairs.floats(D * s.Q));
  if (paired) pair_weight(s, turned_key, paired_key);
#endif

#pragma omp parallel num_threads(threads)
  {
    Arena arena(Arena::size(TILE * s.Dp) + Arena::size(TILE * s.Q) + Arena::size(TILE * s.P) +
                Arena::size(TILE * H) + Arena::size(int64_t(s.P) * s.Dp) + Arena::size(s.P) +
                Arena::size(int64_t(s.P) * s.dp) + Arena::size(TILE * s.P) + Arena::size(TILE * s.Dp));
    float* scratch = arena.floats(TILE * s.Dp);
    float* projected = arena.floats(TILE * s.Q);
    float* phi = arena.floats(TILE * s.P);
    float* w = arena.floats(TILE * H);
    float* key_token = arena.floats(int64_t(s.P) * s.Dp);  // sum of w phi(k) x^T
    float* total = arena.floats(s.P);
    float* padded_state = arena.floats(int64_t(s.P) * s.dp);
#if IFA_BF16
    bf16_pair* paired_phi = reinterpret_cast<bf16_pair*>(arena.floats(TILE * s.P));
    bf16_pair* paired_x = reinterpret_cast<bf16_pair*>(arena.floats(TILE * s.Dp));
#endif

#pragma omp for schedule(dynamic, 1)
    for (int slot = 0; slot < slots; ++slot) {
      const int64_t first = N * slot / slots, last = N * (slot + 1) / slots;
      if (first == last) continue;
      int64_t b = request_of(offsets, B, first);
      bool fresh = true;  // nothing of request b is summed yet
      for (int64_t row = first; row < last; row += TILE) {
        const int64_t rows = smaller(TILE, last - row);
        int64_t stride = 0;
        const float* x = nullptr;
#if IFA_BF16
        const bf16* tokens = static_cast<const bf16*>(history) + row * D;
        if (paired)
          gemm<false>(rows, s.Q, D / 2, reinterpret_cast<const bf16_pair*>(tokens), D / 2, 1, paired_key, s.Q,
                      projected, s.Q);
        else
#endif
        {
          x = tokens_of(s, history, is_bf16, row, rows, scratch, &stride);
          gemm<false>(rows, s.Q, D, x, stride, 1, turned_key, s.Q, projected, s.Q);
        }
        if (weighted) event_weights(s, a, ages, decay, row, rows, w);
        features(s, rows, projected, phi, weighted ? w : nullptr);
        for (int64_t from = row; from < row + rows;) {
          while (offsets[b + 1] <= from) ++b;
          const int64_t to = smaller(offsets[b + 1], row + rows), count = to - from;
          const float* phi_from = phi + (from - row) * s.P;
          if (fresh) {
            memset(total, 0, s.P * 4);
            memset(key_token, 0, int64_t(s.P) * s.Dp * 4);
          }
#if IFA_BF16
          if (paired) {
            pair_features(s.P, count, phi_from, paired_phi);
            pair_tokens(s, count, tokens + (from - row) * D, paired_x);
            gemm<true>(s.P, s.Dp, (count + 1) / 2, paired_phi, 1, s.P, paired_x, s.Dp, key_token, s.Dp);
          } else
#endif
            gemm<true>(s.P, s.Dp, count, phi_from, 1, s.P, x + (from - row) * stride, stride, key_token,
                       s.Dp);
          add_rows(s.P, count, phi_from, total);
          fresh = to == offsets[b + 1];
          if (fresh || to == last) {
            float *state = key_value + b * s.state(), *sum = key_sum + b * sums;
            if (offsets[b] < first) {
              partials.request[slot] = b;
              state = partials.values + slot * partials.each;
              sum = state + s.state();
            }
            float* whole = s.d == s.dp ? state : padded_state;
            const int64_t head = int64_t(s.e) * s.dp;
            for (int h = 0; h < H; ++h)
              gemm<false>(head, s.dp, D, key_token + h * head * s.Dp, s.Dp, 1, turned_value + h * s.dp,
                          s.Q, whole + h * head * s.dp, s.dp);
            if (whole != state) unpad_state(s, whole, state);
            unpad_sum(s, total, sum);
          }
          from = to;
        }
      }
    }
    clear_empty(offsets, B, key_value, s.state(), key_sum, sums);
  }
  partials.add_to(slots, key_value, s.state(), key_sum, sums);
}

// Sums of all slots' gradients of a padded weight [Q, Dp], as the caller has it [H, d, D].
static void add_up_weight(const Shape& s, int slots, int64_t each, const float* parts, float* weight) {
  memset(weight, 0, int64_t(s.H) * s.d * s.D * 4);
  for (int slot = 0; slot < slots; ++slot)
    for (int h = 0; h < s.H; ++h)
      for (int i = 0; i < s.d; ++i)
        add(weight + (h * s.d + i) * s.D, parts + slot * each + (h * s.dp + i) * s.Dp, s.D);
}

IFA_KERNEL(encode_backward)
(const float* grad_key_value, const float* grad_key_sum, const void* history,
                            int is_bf16, const int64_t* offsets, int64_t B, const float* key,
                            const float* value, const float* a, const float* ages, const float* decay,
                            int D, int H, int d, int map, void* grad_history, float* grad_key,
                            float* grad_value, float* grad_a, int threads) {
  const Shape s(D, H, d, map);
  const int64_t N = offsets[B], sums = int64_t(H) * s.features();
  const int64_t matrix = Arena::size(int64_t(s.Q) * s.Dp), head = int64_t(s.e) * s.dp;
  const int slots = slots_of(N);
  Arena shared(Arena::size(D * s.Q) + 2 * matrix + 2 * matrix * slots);
  float* turned_key = shared.zeros(D * s.Q);
  float* padded_key = shared.zeros(int64_t(s.Q) * s.Dp);
  float* padded_value = shared.zeros(int64_t(s.Q) * s.Dp);
  float* grads = shared.zeros(2 * matrix * slots);  // of both weights, a slot each
  turn_weight(s, key, turned_key);
  pad_weight(s, key, padded_key);
  pad_weight(s, value, padded_value);
  const bool weighted = a || ages_matter(ages, decay, H);

#pragma omp parallel num_threads(threads)
  {
    Arena arena(Arena::size(TILE * s.Dp) * 2 + Arena::size(TILE * s.Q) + Arena::size(TILE * s.P) * 3 +
                Arena::size(TILE * H) * 2 + Arena::size(int64_t(s.P) * s.Dp) * 3 +
                Arena::size(int64_t(s.P) * s.dp) * 2 + Arena::size(s.P));
    float* scratch = arena.floats(TILE * s.Dp);
    float* grad_scratch = arena.floats(TILE * s.Dp);
    float* projected = arena.floats(TILE * s.Q);
    float* phi = arena.floats(TILE * s.P);
    float* weighted_phi = arena.floats(TILE * s.P);
    float* grad_phi = arena.floats(TILE * s.P);
    float* w = arena.floats(TILE * H);
    float* decayed = arena.floats(TILE * H);
    float* key_token = arena.floats(int64_t(s.P) * s.Dp);
    float* grad_key_token = arena.floats(int64_t(s.P) * s.Dp);  // [P, Dp]
    float* turned_grad = arena.floats(int64_t(s.P) * s.Dp);     // [Dp, P]
    float* grad_state = arena.floats(int64_t(s.P) * s.dp);
    float* turned_grad_state = arena.floats(int64_t(s.P) * s.dp);
    float* grad_total = arena.floats(s.P);

#pragma omp for schedule(dynamic, 1)
    for (int slot = 0; slot < slots; ++slot) {
      const int64_t first = N * slot / slots, last = N * (slot + 1) / slots;
      if (first == last) continue;
      float *slot_key = grads + 2 * matrix * slot, *slot_value = slot_key + matrix;
      int64_t b = request_of(offsets, B, first);
      bool fresh = true;
      for (int64_t row = first; row < last; row += TILE) {
        const int64_t rows = smaller(TILE, last - row);
        int64_t stride;
        const float* x = tokens_of(s, history, is_bf16, row, rows, scratch, &stride);
        float* grad_x = grad_tokens_of(s, grad_history, is_bf16, row, grad_scratch);
        gemm<false>(rows, s.Q, D, x, stride, 1, turned_key, s.Q, projected, s.Q);
        features(s, rows, projected, phi, nullptr);
        const float* of_sum = phi;  // what the state is the sum of
        if (weighted) {
          event_weights(s, a, ages, decay, row, rows, w);
          for (int64_t i = 0; i < rows * H; ++i)
            for (int64_t f = 0; f < head; f += VL)
              store(weighted_phi + i * head + f, load(phi + i * head + f) * w[i]);
          of_sum = weighted_phi;
        }
        for (int64_t from = row; from < row + rows;) {
          while (offsets[b + 1] <= from) ++b;
          const int64_t to = smaller(offsets[b + 1], row + rows), count = to - from;
          const float *x_from = x + (from - row) * stride, *sum_from = of_sum + (from - row) * s.P;
          if (fresh) {
            pad_state(s, grad_key_value + b * s.state(), grad_state);
            pad_sum(s, grad_key_sum + b * sums, grad_total);
            turn_state(s, grad_state, turned_grad_state);
            for (int h = 0; h < H; ++h) {
              const float *state = grad_state + h * head * s.dp, *of_head = padded_value + h * s.dp * s.Dp;
              const float* turned = turned_grad_state + h * head * s.dp;
              gemm<false>(head, s.Dp, s.dp, state, s.dp, 1, of_head, s.Dp,
                          grad_key_token + h * head * s.Dp, s.Dp);
              gemm<false>(s.Dp, int(head), s.dp, of_head, 1, s.Dp, turned, head, turned_grad + h * head,
                          s.P);
            }
          }
          float* grad_from = grad_phi + (from - row) * s.P;
          for (int64_t t = 0; t < count; ++t) memcpy(grad_from + t * s.P, grad_total, s.P * 4);
          gemm<true>(count, s.P, s.Dp, x_from, stride, 1, turned_grad, s.P, grad_from, s.P);
          gemm<false>(count, s.Dp, s.P, sum_from, s.P, 1, grad_key_token, s.Dp,
                      grad_x + (from - row) * s.Dp, s.Dp);
          if (fresh)
            gemm<false>(s.P, s.Dp, count, sum_from, 1, s.P, x_from, stride, key_token, s.Dp);
          else
            gemm<true>(s.P, s.Dp, count, sum_from, 1, s.P, x_from, stride, key_token, s.Dp);
          fresh = to == offsets[b + 1];
          if (fresh || to == last)
            for (int h = 0; h < H; ++h)
              gemm<true>(s.dp, s.Dp, head, grad_state + h * head * s.dp, 1, s.dp,
                         key_token + h * head * s.Dp, s.Dp, slot_value + h * s.dp * s.Dp, s.Dp);
          from = to;
        }
        if (grad_a) {
          event_weights(s, nullptr, ages, decay, row, rows, decayed);
          for (int64_t t = 0; t < rows; ++t) {
            float grad = 0;
            for (int h = 0; h < H; ++h) {
              vec product = vec{};
              const int64_t at = (t * H + h) * head;
              for (int64_t f = 0; f < head; f += VL) product += load(phi + at + f) * load(grad_phi + at + f);
              grad += sum_of(product) * decayed[t * H + h];
            }
            grad_a[row + t] = grad;
          }
        }
        // the projections are read no more: their gradient takes their place
        features_backward(s, rows, phi, grad_phi, weighted ? w : nullptr, projected);
        gemm<true>(rows, s.Dp, s.Q, projected, s.Q, 1, padded_key, s.Dp, grad_x, s.Dp);
        gemm<true>(s.Q, s.Dp, rows, projected, 1, s.Q, x, stride, slot_key, s.Dp);
        write_tokens(s, grad_x, rows, grad_history, is_bf16, row);
      }
    }
  }
  add_up_weight(s, slots, 2 * matrix, grads, grad_key);
  add_up_weight(s, slots, 2 * matrix, grads + matrix, grad_value);
}

// ------------------------------------------------------------------------------------------- attend

// Of rows of one request: matched = phi z [rows, H] and out = phi S / (matched + eps) [rows, Q].
static void read_out(const Shape& s, int64_t rows, const float* phi, const float* state, const float* sum,
                     float eps, float* out, float* matched) {
  const int64_t head = int64_t(s.e) * s.dp;
  for (int h = 0; h < s.H; ++h) {
    gemm<false>(rows, s.dp, head, phi + h * head, s.P, 1, state + h * head * s.dp, s.dp, out + h * s.dp,
                s.Q);
    for (int64_t t = 0; t < rows; ++t) {
      vec product = vec{};
      for (int64_t f = 0; f < head; f += VL)
        product += load(phi + t * s.P + h * head + f) * load(sum + h * head + f);
      const float total = sum_of(product), share = 1.0f / (total + eps);
      matched[t * s.H + h] = total;
      float* of_row = out + t * s.Q + h * s.dp;
      for (int j = 0; j < s.dp; j += VL) store(of_row + j, load(of_row + j) * share);
    }
  }
}

IFA_KERNEL(attend)
(const void* candidates, int is_bf16, const int64_t* offsets, int64_t B,
                   const float* query, const float* key_value, const float* key_sum, int D, int H, int d,
                   int map, float eps, float* out, float* matched, int threads) {
  const Shape s(D, H, d, map);
  const int64_t M = offsets[B], sums = int64_t(H) * s.features();
  const int slots = slots_of(4 * M);
  Arena weights(Arena::size(D * s.Q));
  float* turned_query = weights.zeros(D * s.Q);
  turn_weight(s, query, turned_query);

#pragma omp parallel num_threads(threads)
  {
    Arena arena(Arena::size(TILE * s.Dp) + Arena::size(TILE * s.Q) * 2 + Arena::size(TILE * s.P) +
                Arena::size(TILE * H) + Arena::size(int64_t(s.P) * s.dp) + Arena::size(s.P));
    float* scratch = arena.floats(TILE * s.Dp);
    float* projected = arena.floats(TILE * s.Q);
    float* read = arena.floats(TILE * s.Q);
    float* phi = arena.floats(TILE * s.P);
    float* total = arena.floats(TILE * H);
    float* padded_state = arena.floats(int64_t(s.P) * s.dp);
    float* sum = arena.floats(s.P);

#pragma omp for schedule(dynamic, 1)
    for (int slot = 0; slot < slots; ++slot) {
      const int64_t first = M * slot / slots, last = M * (slot + 1) / slots;
      if (first == last) continue;
      int64_t b = request_of(offsets, B, first), held = -1;
      const float* state = nullptr;
      for (int64_t row = first; row < last; row += TILE) {
        const int64_t rows = smaller(TILE, last - row);
        int64_t stride;
        const float* x = tokens_of(s, candidates, is_bf16, row, rows, scratch, &stride);
        gemm<false>(rows, s.Q, D, x, stride, 1, turned_query, s.Q, projected, s.Q);
        features(s, rows, projected, phi, nullptr);
        for (int64_t from = row; from < row + rows;) {
          while (offsets[b + 1] <= from) ++b;
          const int64_t to = smaller(offsets[b + 1], row + rows), count = to - from, at = from - row;
          if (b != held) {
            state = key_value + b * s.state();
            if (s.d != s.dp) {
              pad_state(s, state, padded_state);
              state = padded_state;
            }
            pad_sum(s, key_sum + b * sums, sum);
            held = b;
          }
          read_out(s, count, phi + at * s.P, state, sum, eps, read + at * s.Q, total + at * H);
          from = to;
        }
        for (int64_t t = 0; t < rows; ++t)
          for (int h = 0; h < H; ++h) {
            memcpy(out + ((row + t) * H + h) * d, read + t * s.Q + h * s.dp, d * 4);
            matched[(row + t) * H + h] = total[t * H + h];
          }
      }
    }
  }
}

IFA_KERNEL(attend_backward)
(const float* grad_out, const float* grad_matched, const void* candidates,
                            int is_bf16, const int64_t* offsets, int64_t B, const float* query,
                            const float* key_value, const float* key_sum, int D, int H, int d, int map,
                            float eps, void* grad_candidates, float* grad_query, float* grad_key_value,
                            float* grad_key_sum, int threads) {
  const Shape s(D, H, d, map);
  const int64_t M = offsets[B], sums = int64_t(H) * s.features();
  const int64_t matrix = Arena::size(int64_t(s.Q) * s.Dp), head = int64_t(s.e) * s.dp;
  const int slots = slots_of(4 * M);
  Arena shared(Arena::size(D * s.Q) + matrix + matrix * slots);
  float* turned_query = shared.zeros(D * s.Q);
  float* padded_query = shared.zeros(int64_t(s.Q) * s.Dp);
  float* grads = shared.zeros(matrix * slots);
  turn_weight(s, query, turned_query);
  pad_weight(s, query, padded_query);
  Partials partials(slots, s.state() + sums);

#pragma omp parallel num_threads(threads)
  {
    const int64_t of_state = Arena::size(int64_t(s.P) * s.dp);
    Arena arena(Arena::size(TILE * s.Dp) * 2 + Arena::size(TILE * s.Q) * 3 + Arena::size(TILE * s.P) * 2 +
                Arena::size(TILE * H) * 2 + of_state * 3 + Arena::size(s.P) * 2);
    float* scratch = arena.floats(TILE * s.Dp);
    float* grad_scratch = arena.floats(TILE * s.Dp);
    float* projected = arena.floats(TILE * s.Q);
    float* read = arena.floats(TILE * s.Q);
    float* upstream = arena.floats(TILE * s.Q);
    float* phi = arena.floats(TILE * s.P);
    float* grad_phi = arena.floats(TILE * s.P);
    float* total = arena.floats(TILE * H);
    float* grad_total = arena.floats(TILE * H);
    float* state = arena.floats(int64_t(s.P) * s.dp);
    float* turned_state = arena.floats(int64_t(s.P) * s.dp);
    float* grad_state = arena.floats(int64_t(s.P) * s.dp);
    float* sum = arena.floats(s.P);
    float* grad_sum = arena.floats(s.P);

#pragma omp for schedule(dynamic, 1)
    for (int slot = 0; slot < slots; ++slot) {
      const int64_t first = M * slot / slots, last = M * (slot + 1) / slots;
      if (first == last) continue;
      float* slot_query = grads + matrix * slot;
      int64_t b = request_of(offsets, B, first);
      bool fresh = true;
      for (int64_t row = first; row < last; row += TILE) {
        const int64_t rows = smaller(TILE, last - row);
        int64_t stride;
        const float* x = tokens_of(s, candidates, is_bf16, row, rows, scratch, &stride);
        float* grad_x = grad_tokens_of(s, grad_candidates, is_bf16, row, grad_scratch);
        gemm<false>(rows, s.Q, D, x, stride, 1, turned_query, s.Q, projected, s.Q);
        features(s, rows, projected, phi, nullptr);
        for (int64_t from = row; from < row + rows;) {
          while (offsets[b + 1] <= from) ++b;
          const int64_t to = smaller(offsets[b + 1], row + rows), count = to - from, at = from - row;
          if (fresh) {
            pad_state(s, key_value + b * s.state(), state);
            pad_sum(s, key_sum + b * sums, sum);
            turn_state(s, state, turned_state);
            memset(grad_state, 0, int64_t(s.P) * s.dp * 4);
            memset(grad_sum, 0, s.P * 4);
          }
          const float* phi_from = phi + at * s.P;
          read_out(s, count, phi_from, state, sum, eps, read + at * s.Q, total + at * H);
          for (int64_t i = at * H; i < (at + count) * H; ++i) {
            // of out = numerator / normaliser: the gradients of both
            float* up = upstream + i * s.dp;
            const int64_t outside = row * H + i;
            memcpy(up, grad_out + outside * d, d * 4);
            for (int j = d; j < s.dp; ++j) up[j] = 0;
            vec product = vec{};
            const float share = 1.0f / (total[i] + eps);
            for (int j = 0; j < s.dp; j += VL) {
              store(up + j, load(up + j) * share);
              product += load(up + j) * load(read + i * s.dp + j);
            }
            grad_total[i] = grad_matched[outside] - sum_of(product);
          }
          float* grad_from = grad_phi + at * s.P;
          for (int h = 0; h < H; ++h) {
            const float* up = upstream + at * s.Q + h * s.dp;
            gemm<true>(head, s.dp, count, phi_from + h * head, 1, s.P, up, s.Q,
                       grad_state + h * head * s.dp, s.dp);
            for (int64_t t = 0; t < count; ++t) {
              const float grad = grad_total[(at + t) * H + h];
              for (int64_t f = h * head; f < (h + 1) * head; f += VL) {
                store(grad_sum + f, load(grad_sum + f) + grad * load(phi_from + t * s.P + f));
                store(grad_from + t * s.P + f, grad * load(sum + f));
              }
            }
            gemm<true>(count, int(head), s.dp, up, s.Q, 1, turned_state + h * head * s.dp, head,
                       grad_from + h * head, s.P);
          }
          fresh = to == offsets[b + 1];
          if (fresh || to == last) {
            float *to_state = grad_key_value + b * s.state(), *to_sum = grad_key_sum + b * sums;
            if (offsets[b] < first) {
              partials.request[slot] = b;
              to_state = partials.values + slot * partials.each;
              to_sum = to_state + s.state();
            }
            unpad_state(s, grad_state, to_state);
            unpad_sum(s, grad_sum, to_sum);
          }
          from = to;
        }
        features_backward(s, rows, phi, grad_phi, nullptr, projected);
        gemm<false>(rows, s.Dp, s.Q, projected, s.Q, 1, padded_query, s.Dp, grad_x, s.Dp);
        gemm<true>(s.Q, s.Dp, rows, projected, 1, s.Q, x, stride, slot_query, s.Dp);
        write_tokens(s, grad_x, rows, grad_candidates, is_bf16, row);
      }
    }
    clear_empty(offsets, B, grad_key_value, s.state(), grad_key_sum, sums);
  }
  partials.add_to(slots, grad_key_value, s.state(), grad_key_sum, sums);
  add_up_weight(s, slots, matrix, grads, grad_query);
}
