// Vectors of floats, in the compiler's own terms, so that one text serves every processor.
//
// Included once by each of isa_*.cpp, which says how many floats a vector has and which
// instructions the compiler may use. Nothing here or below includes a header of the C++ library:
// its inline functions, compiled for one processor, could be linked into the code of another.
#pragma once

typedef float vec __attribute__((vector_size(4 * IFA_VECTOR)));
typedef int32_t ivec __attribute__((vector_size(4 * IFA_VECTOR)));
typedef float unaligned_vec __attribute__((vector_size(4 * IFA_VECTOR), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * IFA_VECTOR)));
typedef uint32_t unaligned_uvec __attribute__((vector_size(4 * IFA_VECTOR), aligned(4), may_alias));
typedef uint16_t bf16;
typedef uint16_t bf16_vec __attribute__((vector_size(2 * IFA_VECTOR), aligned(2), may_alias));
typedef uint32_t bf16_pair __attribute__((may_alias));  // the first in the lower half

constexpr int VL = IFA_VECTOR;          // floats in a vector
constexpr int PANEL = IFA_PANEL;        // vectors in a row of a block of gemm

static inline vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
static inline void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }
static inline uvec load(const bf16_pair* p) { return *reinterpret_cast<const unaligned_uvec*>(p); }
static inline void store(bf16_pair* p, uvec v) { *reinterpret_cast<unaligned_uvec*>(p) = v; }
static inline vec all(float x) { return x - vec{}; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int padded(int width) { return (width + VL - 1) / VL * VL; }

// exp to 1 unit in the last place or two; 0 below -87.3, where floats end; NaN stays NaN.
static inline vec exp_of(vec x) {
  const vec low = all(-87.3f), high = all(88.3f), none = all(0.0f);
  vec y = x > high ? high : x;
  const vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  vec shifted = y * 1.44269504f + magic;
  vec n = shifted - magic;
  vec r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  ivec exponent = ((ivec)shifted << 23) + 0x3f800000;
  vec result = p * (vec)exponent;
  return x < low ? none : result;
}

static inline float sum_of(vec v) {
  float lanes[VL];
  store(lanes, v);
  for (int width = VL / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

static inline float largest_of(vec v) {
  float lanes[VL], result = v[0];
  store(lanes, v);
  for (int i = 1; i < VL; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

static inline float float_of(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

static inline bf16 bf16_of(float x) {  // to the nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN
  return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uvec bf16_bits_of(vec x) {  // as above, in the lower halves
  uvec bits = (uvec)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x == x ? rounded : uvec{} + 0x7fc0;
}

// ------------------------------------------------------------------------------ matrix products

// Elements are floats, or pairs of bf16 whose two products are both added, by one instruction where
// IFA_BF16 says that there is one.
static inline void add_product(vec& sum, float a, vec b) { sum += a * b; }
#if IFA_BF16
static inline void add_product(vec& sum, uint32_t a, uvec b) {
  sum = (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(a + uvec{}), (__m512bh)b);
}
#endif

// One block of C [R, V vectors] = or += A [R, K] B [K, V vectors], held in registers.
template <int R, int V, bool ADD, class E>
static inline void gemm_block(int64_t K, const E* a, int64_t a_row, int64_t a_col, const E* b, int64_t b_row,
                              float* c, int64_t c_row) {
  vec sum[R][V];
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = ADD ? load(c + r * c_row + v * VL) : vec{};
  for (int64_t k = 0; k < K; ++k) {
    decltype(load(b)) right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + k * b_row + v * VL);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const E left = a[r * a_row + k * a_col];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) add_product(sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * VL, sum[r][v]);
}

template <int R, int V, bool ADD, class E>
static inline int64_t gemm_rows(int64_t first, int64_t rows, int64_t K, const E* a, int64_t a_row,
                                int64_t a_col, const E* b, int64_t b_row, float* c, int64_t c_row) {
  for (; first + R <= rows; first += R)
    gemm_block<R, V, ADD>(K, a + first * a_row, a_row, a_col, b, b_row, c + first * c_row, c_row);
  return first;
}

template <int V, bool ADD, class E>
static void gemm_panel(int64_t rows, int64_t K, const E* a, int64_t a_row, int64_t a_col, const E* b,
                       int64_t b_row, float* c, int64_t c_row) {
  constexpr int R = IFA_ACCUMULATORS / V < 12 ? IFA_ACCUMULATORS / V : 12;
  int64_t i = gemm_rows<R, V, ADD>(0, rows, K, a, a_row, a_col, b, b_row, c, c_row);
  if (R > 4) i = gemm_rows<4, V, ADD>(i, rows, K, a, a_row, a_col, b, b_row, c, c_row);
  if (R > 2) i = gemm_rows<2, V, ADD>(i, rows, K, a, a_row, a_col, b, b_row, c, c_row);
  gemm_rows<1, V, ADD>(i, rows, K, a, a_row, a_col, b, b_row, c, c_row);
}

// C [rows, columns] = or += A [rows, K] B [K, columns]; element (i, k) of A is a[i a_row + k a_col].
// columns is a multiple of VL.
template <bool ADD, class E>
static void gemm(int64_t rows, int columns, int64_t K, const E* a, int64_t a_row, int64_t a_col, const E* b,
                 int64_t b_row, float* c, int64_t c_row) {
  int j = 0;
  for (; j + PANEL * VL <= columns; j += PANEL * VL)
    gemm_panel<PANEL, ADD>(rows, K, a, a_row, a_col, b + j, b_row, c + j, c_row);
  if (PANEL > 2 && j + 2 * VL <= columns) {
    gemm_panel<2, ADD>(rows, K, a, a_row, a_col, b + j, b_row, c + j, c_row);
    j += 2 * VL;
  }
  for (; j < columns; j += VL) gemm_panel<1, ADD>(rows, K, a, a_row, a_col, b + j, b_row, c + j, c_row);
}
