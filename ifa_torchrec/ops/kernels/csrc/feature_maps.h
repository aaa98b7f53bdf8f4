// The feature maps of feature_maps.py and their derivatives.
#pragma once

// phi [rows, P] of the projections [rows, Q]; each head is multiplied by w[row, head] if w is given.
static void features(const Shape& s, int64_t rows, float* projected, float* phi, const float* w) {
  // A mask for the last vector of a head: all bits set for a feature, none for padding. The padding of an
  // infinite token is NaN, which multiplying by zero would not remove.
  ivec last = ivec{};
  for (int j = 0; j < VL; ++j) last[j] = s.dp - VL + j < s.d ? -1 : 0;
  const int whole = s.dp - VL;
  if (s.map != HEDGEHOG) {
    for (int64_t i = 0; i < rows * s.H; ++i) {
      const float* x = projected + i * s.dp;
      float* y = phi + i * s.dp;
      for (int j = 0; j < s.dp; j += VL) {
        vec value = load(x + j), none = vec{};
        vec result = none > value ? none : value;  // this order keeps a NaN
        if (s.map == ELU) result += exp_of(value < none ? value : none);
        if (j == whole) result = (vec)((ivec)result & last);
        store(y + j, w ? result * w[i] : result);
      }
    }
    return;
  }
  // Softmax over x and over -x. If all |x| are below 80, nothing needs to be subtracted first: exp and
  // its inverse are well within the range of float, and one exp serves both.
  vec most = vec{};
  for (int64_t i = 0; i < rows * s.Q; i += VL) {
    vec value = load(projected + i);
    value = value < vec{} ? -value : value;
    most = value > most ? value : most;  // ignores a NaN: its head becomes NaN either way
  }
  bool tame = max_of(most) < 80.0f;
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

// The gradient [rows, Q] of the projections, from that of phi [rows, P]; phi is without weights.
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
      vec value = load(y + j), one = broadcast(1.0f), none = vec{};
      vec slope = s.map == ELU ? (value < one ? value : one) : (value > none ? one : none);
      store(to + j, load(g + j) * slope * weight);
    }
  }
}
