// The kernels' internal memory layouts of the caller's data: padded to whole vectors, transposed, paired.
//
// Letters as in ops/__init__.py. The features of a head are padded to whole vectors: a head has dp >= d
// columns and its phi e * dp (e = 2 for hedgehog, whose halves are padded separately); all heads together
// have Q = H * dp projections and P = H * e * dp features; a token has Dp >= D columns. Padding is zero.
#pragma once

enum Map { ELU = 0, RELU = 1, HEDGEHOG = 2 };

struct Shape {
  int D, H, d, map;
  int Dp, dp, e, Q, P;
  Shape(int D, int H, int d, int map) : D(D), H(H), d(d), map(map) {
    Dp = padded(D), dp = padded(d), e = map == HEDGEHOG ? 2 : 1;
    Q = H * dp, P = Q * e;
  }
  int features() const { return e * d; }                        // d_phi
  int64_t state() const { return sum() * d; }                   // size of S of one request
  int64_t sum() const { return int64_t(H) * features(); }        // size of z of one request
  int64_t head() const { return int64_t(e) * dp; }               // size of phi of one head, padded
};

// Memory for floats, aligned to a cache line.
class Floats {
 public:
  explicit Floats(int64_t count) : bytes_((max(count, 1) + 15) / 16 * 64) {
    data_ = static_cast<float*>(aligned_alloc(64, bytes_));
    if (!data_) abort();
  }
  ~Floats() { free(data_); }
  Floats(const Floats&) = delete;
  float* data() const { return data_; }
  operator float*() const { return data_; }
  void clear() { memset(data_, 0, bytes_); }

 private:
  int64_t bytes_;
  float* data_;
};

static void add(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// ---------------------------------------------------------------------------------- tokens, weights

// Rows of tokens as floats with Dp columns: the caller's memory if it has that layout, else a copy.
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

// Where to write the gradient of rows of tokens, Dp columns: the output if it has that layout, else scratch.
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

// A projection's weight [H, d, D], padded to [Q, Dp], and below transposed to [D, Q].
static void pad_weight(const Shape& s, const float* weight, float* padded_weight) {
  memset(padded_weight, 0, int64_t(s.Q) * s.Dp * 4);
  for (int h = 0; h < s.H; ++h)
    for (int i = 0; i < s.d; ++i)
      memcpy(padded_weight + (h * s.dp + i) * s.Dp, weight + (h * s.d + i) * s.D, s.D * 4);
}

static void transpose_weight(const Shape& s, const float* weight, float* transposed) {
  memset(transposed, 0, int64_t(s.D) * s.Q * 4);
  for (int h = 0; h < s.H; ++h)
    for (int i = 0; i < s.d; ++i)
      for (int j = 0; j < s.D; ++j) transposed[j * s.Q + h * s.dp + i] = weight[(h * s.d + i) * s.D + j];
}

// ------------------------------------------------------------------------------------------- states

// Pads a request's S from the caller's [H, e d, d] to [H, e dp, dp].
static void pad_state(const Shape& s, const float* state, float* padded_state) {
  for (int block = 0; block < s.H * s.e; ++block)
    for (int f = 0; f < s.dp; ++f) {
      float* to = padded_state + (block * s.dp + f) * s.dp;
      for (int j = 0; j < s.dp; ++j)
        to[j] = f < s.d && j < s.d ? state[(block * s.d + f) * s.d + j] : 0.0f;
    }
}

// Each head's part of a padded state [e dp, dp] transposed, [dp, e dp].
static void transpose_state(const Shape& s, const float* state, float* transposed) {
  const int64_t head = s.head();
  for (int h = 0; h < s.H; ++h, state += head * s.dp, transposed += head * s.dp)
    for (int64_t f = 0; f < head; ++f)
      for (int j = 0; j < s.dp; ++j) transposed[j * head + f] = state[f * s.dp + j];
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

// --------------------------------------------------------------------------------- pairs of bfloat16

// A transposed weight [D, Q] as pairs of rows [D / 2, Q].
static inline void pair_weight(const Shape& s, const float* transposed, bf16_pair* pairs) {
  for (int i = 0; i < s.D / 2; ++i)
    for (int j = 0; j < s.Q; ++j)
      pairs[i * s.Q + j] = bf16_of(transposed[2 * i * s.Q + j]) | uint32_t(bf16_of(transposed[(2 * i + 1) * s.Q + j])) << 16;
}

// phi [rows, P] as pairs of rows [rows / 2, P]; an odd last row is paired with zeros.
static inline void pair_features(int P, int64_t rows, const float* phi, bf16_pair* pairs) {
  for (int64_t t = 0; t < rows; t += 2)
    for (int f = 0; f < P; f += VL) {
      uvec second = t + 1 < rows ? bf16_bits_of(load(phi + (t + 1) * P + f)) : uvec{};
      store(pairs + t / 2 * P + f, bf16_bits_of(load(phi + t * P + f)) | second << 16);
    }
}

// Tokens [rows, D] as pairs of rows [rows / 2, Dp].
static inline void pair_tokens(const Shape& s, int64_t rows, const bf16* x, bf16_pair* pairs) {
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
