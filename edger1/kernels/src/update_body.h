// The loops of update_table.h for one instruction set.
#pragma once

#include <cmath>

#include "simd.h"
#include "update_table.h"

namespace edger1 {
namespace {

EDGER1_INLINE vf vsqrt(vf x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__aarch64__)
  return vsqrtq_f32(x);
#else
  vf y{};
  for (int i = 0; i < kWidth; i++) {
    y[i] = std::sqrt(x[i]);
  }
  return y;
#endif
}

static void adamw(float* w_out, float* m_out, float* v_out, const float* w, const float* g, const float* m,
                  const float* v, int64_t n, const AdamW& with) {
  const vf scale = splat(with.gradient_scale), b1 = splat(with.beta1), b2 = splat(with.beta2);
  const vf a1 = splat(1 - with.beta1), a2 = splat(1 - with.beta2), keep = splat(1 - with.rate * with.decay);
  const vf rate = splat(with.rate / with.first), root = splat(1 / std::sqrt(with.second)), epsilon = splat(with.epsilon);
  auto step = [&](vf& x, vf grad, vf& first, vf& second) {
    grad = grad * scale;
    first = b1 * first + a1 * grad;
    second = b2 * second + a2 * grad * grad;
    x = x * keep - rate * first / (vsqrt(second) * root + epsilon);
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    vf x = load(w + i), first = load(m + i), second = load(v + i);
    step(x, load(g + i), first, second);
    store(w_out + i, x);
    store(m_out + i, first);
    store(v_out + i, second);
  }
  if (i < n) {
    int rest = static_cast<int>(n - i);
    vf x = load_n(w + i, rest), first = load_n(m + i, rest), second = load_n(v + i, rest);
    step(x, load_n(g + i, rest), first, second);
    store_n(w_out + i, x, rest);
    store_n(m_out + i, first, rest);
    store_n(v_out + i, second, rest);
  }
}

static void blend(float* out, const float* x, float a, const float* y, float b, int64_t n) {
  const vf va = splat(a), vb = splat(b);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    store(out + i, load(x + i) * va + load(y + i) * vb);
  }
  if (i < n) {
    int rest = static_cast<int>(n - i);
    store_n(out + i, load_n(x + i, rest) * va + load_n(y + i, rest) * vb, rest);
  }
}

static double squares(const float* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += 1024) {
    int64_t end = i + 1024 < n ? i + 1024 : n, j = i;
    vf part{};
    for (; j + kWidth <= end; j += kWidth) {
      vf y = load(x + j);
      part = mad(y, y, part);
    }
    if (j < end) {
      vf y = load_n(x + j, static_cast<int>(end - j));
      part = mad(y, y, part);
    }
    sum += static_cast<double>(hsum(part));
  }
  return sum;
}

} // namespace
} // namespace edger1

#define EDGER1_UPDATE_TABLE {adamw, blend, squares}
