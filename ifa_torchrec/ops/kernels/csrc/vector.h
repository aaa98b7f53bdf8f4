// Vectors of floats as compiler extensions, so that one source serves every processor.
//
// Included once by each isa_*.cpp, which sets how many floats a vector has and which instructions the
// compiler may use. Nothing here or below includes a header of the C++ library: its inline functions,
// compiled for one processor, could be linked into the code of another.
#pragma once

typedef float vec __attribute__((vector_size(4 * IFA_VECTOR)));
typedef int32_t ivec __attribute__((vector_size(4 * IFA_VECTOR)));
typedef float unaligned_vec __attribute__((vector_size(4 * IFA_VECTOR), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * IFA_VECTOR)));
typedef uint32_t unaligned_uvec __attribute__((vector_size(4 * IFA_VECTOR), aligned(4), may_alias));
typedef uint16_t bf16;
typedef uint16_t bf16_vec __attribute__((vector_size(2 * IFA_VECTOR), aligned(2), may_alias));
typedef uint32_t bf16_pair __attribute__((may_alias));  // the first in the lower half

constexpr int VL = IFA_VECTOR;  // floats in a vector

static inline vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
static inline void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }
static inline uvec load(const bf16_pair* p) { return *reinterpret_cast<const unaligned_uvec*>(p); }
static inline void store(bf16_pair* p, uvec v) { *reinterpret_cast<unaligned_uvec*>(p) = v; }
static inline vec broadcast(float x) { return x - vec{}; }
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int padded(int width) { return (width + VL - 1) / VL * VL; }

// exp, exact to 1 or 2 units in the last place; 0 below -87.3, where floats underflow; NaN stays NaN.
static inline vec exp_of(vec x) {
  const vec low = broadcast(-87.3f), high = broadcast(88.3f), none = broadcast(0.0f);
  vec y = x > high ? high : x;
  const vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  vec shifted = y * 1.44269504f + magic;
  vec n = shifted - magic;
  vec r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = broadcast(1.9875691500e-4f);
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

static inline float max_of(vec v) {
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

static inline bf16 bf16_of(float x) {  // rounds to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN
  return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uvec bf16_bits_of(vec x) {  // as above, bits in the lower halves
  uvec bits = (uvec)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x == x ? rounded : uvec{} + 0x7fc0;
}
