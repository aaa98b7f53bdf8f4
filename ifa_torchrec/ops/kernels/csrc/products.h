// Matrix products, in blocks that stay in registers.
#pragma once

constexpr int PANEL = IFA_PANEL;  // vectors in a row of a block

// Elements are floats, or, with IFA_BF16, pairs of bf16 whose two products are both added by one
// instruction.
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

template <class E>
struct Operand {
  typedef const E* pointer;  // not deduced from the argument, so that it may be Floats
};

// C [rows, columns] = or += A [rows, K] B [K, columns]; element (i, k) of A is a[i a_row + k a_col].
// columns is a multiple of VL.
template <bool ADD, class E = float>
static void gemm(int64_t rows, int columns, int64_t K, typename Operand<E>::pointer a, int64_t a_row,
                 int64_t a_col, typename Operand<E>::pointer b, int64_t b_row, float* c, int64_t c_row) {
  int j = 0;
  for (; j + PANEL * VL <= columns; j += PANEL * VL)
    gemm_panel<PANEL, ADD>(rows, K, a, a_row, a_col, b + j, b_row, c + j, c_row);
  if (PANEL > 2 && j + 2 * VL <= columns) {
    gemm_panel<2, ADD>(rows, K, a, a_row, a_col, b + j, b_row, c + j, c_row);
    j += 2 * VL;
  }
  for (; j < columns; j += VL) gemm_panel<1, ADD>(rows, K, a, a_row, a_col, b + j, b_row, c + j, c_row);
}
