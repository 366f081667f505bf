// Norms, softmax, rotary embedding and activations over contiguous floats, for one instruction set; see ops_table.h.
#pragma once

#include <cmath>

#include "ops_table.h"
#include "simd.h"

namespace edger1 {
namespace {

// Calls full(i) for each whole vector of n elements and tail(i, left) for the rest.
template <class Full, class Tail>
EDGER1_INLINE void over(int64_t n, Full full, Tail tail) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    full(i);
  }
  if (i < n) {
    tail(i, static_cast<int>(n - i));
  }
}

// Applies f to vectors read by the given pointers and stores its value.
template <class F, class... In>
EDGER1_INLINE void map(float* out, int64_t n, F f, const In*... in) {
  over(
      n, [&](int64_t i) { store(out + i, f(load(in + i)...)); },
      [&](int64_t i, int left) { store_n(out + i, f(load_n(in + i, left)...), left); });
}

// Sums f over n elements with four accumulators; f must give 0 where its arguments are 0.
template <class F, class... In>
EDGER1_INLINE float reduce(int64_t n, F f, const In*... in) {
  vf acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) {
      acc[u] += f(load(in + i + u * kWidth)...);
    }
  }
  for (; i + kWidth <= n; i += kWidth) {
    acc[0] += f(load(in + i)...);
  }
  if (i < n) {
    acc[1] += f(load_n(in + i, static_cast<int>(n - i))...);
  }
  return hsum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

static float inverse_rms(const float* x, int n, float eps) {
  float sum = reduce(n, [](vf a) { return a * a; }, x);
  return 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
}

static void rms_norm(float* out, const float* x, const float* weight, int n, float eps) {
  vf scale = splat(inverse_rms(x, n, eps));
  if (weight) {
    map(out, n, [&](vf a, vf w) { return a * scale * w; }, x, weight);
  } else {
    map(out, n, [&](vf a) { return a * scale; }, x);
  }
}

// With y = x s w and s = (mean x^2 + eps)^-1/2: dx = s w dy - x s^3 mean(x w dy).
static void rms_norm_vjp(float* dx, float* dw, const float* x, const float* weight, const float* dy, int n, float eps) {
  float s = inverse_rms(x, n, eps);
  vf scale = splat(s);
  if (weight) {
    float mean = reduce(n, [](vf a, vf w, vf d) { return a * w * d; }, x, weight, dy) / static_cast<float>(n);
    vf pull = splat(s * s * s * mean);
    if (dw) {
      map(dw, n, [&](vf w, vf a, vf d) { return w + a * scale * d; }, dw, x, dy);
    }
    map(dx, n, [&](vf a, vf w, vf d) { return scale * w * d - a * pull; }, x, weight, dy);
  } else {
    float mean = reduce(n, [](vf a, vf d) { return a * d; }, x, dy) / static_cast<float>(n);
    vf pull = splat(s * s * s * mean);
    map(dx, n, [&](vf a, vf d) { return scale * d - a * pull; }, x, dy);
  }
}

static void layer_norm(float* out, const float* x, const float* weight, const float* bias, int n, float eps) {
  float mean = reduce(n, [](vf a) { return a; }, x) / static_cast<float>(n);
  vf centre = splat(mean);
  map(out, n, [&](vf a) { return a - centre; }, x);
  vf scale = splat(inverse_rms(out, n, eps));
  if (weight && bias) {
    map(out, n, [&](vf a, vf w, vf b) { return a * scale * w + b; }, out, weight, bias);
  } else if (weight) {
    map(out, n, [&](vf a, vf w) { return a * scale * w; }, out, weight);
  } else if (bias) {
    map(out, n, [&](vf a, vf b) { return a * scale + b; }, out, bias);
  } else {
    map(out, n, [&](vf a) { return a * scale; }, out);
  }
}

static float maximum(const float* x, int64_t n) {
  vf best = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    best = vmax(load(x + i), best);
  }
  float found = hmax(best);
  for (; i < n; i++) {
    found = x[i] > found ? x[i] : found;
  }
  return found;
}

// Writes e^(x - shift) to out and returns the sum, added up in the same order whatever lies beyond n.
EDGER1_INLINE float exp_sum(float* out, const float* x, int64_t n, float shift) {
  vf s = splat(shift);
  vf acc{};
  over(
      n,
      [&](int64_t i) {
        vf e = vexp(load(x + i) - s);
        store(out + i, e);
        acc += e;
      },
      [&](int64_t i, int left) {
        float padded[kWidth];
        store(padded, splat(-__builtin_inff()));
        std::memcpy(padded, x + i, sizeof(float) * static_cast<size_t>(left));
        vf e = vexp(load(padded) - s);
        store_n(out + i, e, left);
        acc += e;
      });
  return hsum(acc);
}

static void scale_row(float* x, float factor, int n) {
  vf f = splat(factor);
  map(x, n, [&](vf a) { return a * f; }, x);
}

static void softmax(float* out, const float* x, int n) {
  float top = maximum(x, n);
  float sum = exp_sum(out, x, n, top);
  scale_row(out, 1.0f / sum, n);
}

static void softmax_vjp(float* dx, const float* y, const float* dy, int n) {
  vf mean = splat(reduce(n, [](vf a, vf b) { return a * b; }, y, dy));
  map(dx, n, [&](vf a, vf b) { return a * (b - mean); }, y, dy);
}

static float log_sum_exp(const float* x, int n) {
  float top = maximum(x, n);
  if (!(top < __builtin_inff() && top > -__builtin_inff())) {
    return top;
  }
  vf s = splat(top);
  vf acc{};
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    acc += vexp(load(x + i) - s);
  }
  float sum = hsum(acc);
  for (; i < n; i++) {
    sum += std::exp(x[i] - top);
  }
  return top + std::log(sum);
}

// The first of the largest elements; NaNs are never larger.
static int64_t argmax(const float* x, int64_t n) {
  float top = maximum(x, n);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    vi equal = load(x + i) == splat(top);
    int32_t any = 0;
    for (int j = 0; j < kWidth; j++) {
      any |= equal[j];
    }
    if (any) {
      break;
    }
  }
  for (; i < n; i++) {
    if (x[i] == top) {
      return i;
    }
  }
  return 0;
}

static void rope(float* out, const float* x, const float* cosines, const float* sines, int half_dims, bool interleaved,
                 bool inverse) {
  float sign = inverse ? -1.0f : 1.0f;
  if (interleaved) {
    for (int i = 0; i < half_dims; i++) {
      float a = x[2 * i], b = x[2 * i + 1], s = sines[i] * sign;
      out[2 * i] = a * cosines[i] - b * s;
      out[2 * i + 1] = a * s + b * cosines[i];
    }
    return;
  }
  vf direction = splat(sign);
  auto rotate = [&](vf a, vf b, vf c, vf s, vf& first, vf& second) {
    s = s * direction;
    first = a * c - b * s;
    second = a * s + b * c;
  };
  over(
      half_dims,
      [&](int64_t i) {
        vf first, second;
        rotate(load(x + i), load(x + half_dims + i), load(cosines + i), load(sines + i), first, second);
        store(out + i, first);
        store(out + half_dims + i, second);
      },
      [&](int64_t i, int n) {
        vf first, second;
        rotate(load_n(x + i, n), load_n(x + half_dims + i, n), load_n(cosines + i, n), load_n(sines + i, n), first,
               second);
        store_n(out + i, first, n);
        store_n(out + half_dims + i, second, n);
      });
}

constexpr float kRootHalf = 0.70710678118654752f;
constexpr float kRootTwoOverPi = 0.79788456080286536f;
constexpr float kInverseRootTwoPi = 0.39894228040143268f;

EDGER1_INLINE vf gelu_tanh_inner(vf x) {
  return splat(kRootTwoOverPi) * (x + splat(0.044715f) * x * x * x);
}

// Value of an activation and, for the gradients, its derivative.
template <Unary op>
EDGER1_INLINE vf value(vf x) {
  if constexpr (op == Unary::exp) {
    return vexp(x);
  } else if constexpr (op == Unary::sigmoid) {
    return vsigmoid(x);
  } else if constexpr (op == Unary::silu) {
    return x * vsigmoid(x);
  } else if constexpr (op == Unary::tanh) {
    return vtanh(x);
  } else if constexpr (op == Unary::gelu) {
    return splat(0.5f) * x * (splat(1.0f) + verf(x * splat(kRootHalf)));
  } else if constexpr (op == Unary::gelu_tanh) {
    return splat(0.5f) * x * (splat(1.0f) + vtanh(gelu_tanh_inner(x)));
  } else {
    return x * vsigmoid(splat(1.702f) * x);
  }
}

template <Unary op>
EDGER1_INLINE vf slope(vf x) {
  vf one = splat(1.0f);
  if constexpr (op == Unary::exp) {
    return vexp(x);
  } else if constexpr (op == Unary::sigmoid) {
    vf s = vsigmoid(x);
    return s * (one - s);
  } else if constexpr (op == Unary::silu) {
    vf s = vsigmoid(x);
    return s * (one + x * (one - s));
  } else if constexpr (op == Unary::tanh) {
    vf t = vtanh(x);
    return one - t * t;
  } else if constexpr (op == Unary::gelu) {
    vf density = splat(kInverseRootTwoPi) * vexp(splat(-0.5f) * x * x);
    return splat(0.5f) * (one + verf(x * splat(kRootHalf))) + x * density;
  } else if constexpr (op == Unary::gelu_tanh) {
    vf t = vtanh(gelu_tanh_inner(x));
    vf inner = splat(kRootTwoOverPi) * (one + splat(3.0f * 0.044715f) * x * x);
    return splat(0.5f) * (one + t) + splat(0.5f) * x * (one - t * t) * inner;
  } else {
    vf s = vsigmoid(splat(1.702f) * x);
    return s * (one + splat(1.702f) * x * (one - s));
  }
}

template <class F>
EDGER1_INLINE void with_unary(Unary op, F f) {
  switch (op) {
    case Unary::exp:
      return f.template operator()<Unary::exp>();
    case Unary::sigmoid:
      return f.template operator()<Unary::sigmoid>();
    case Unary::silu:
      return f.template operator()<Unary::silu>();
    case Unary::tanh:
      return f.template operator()<Unary::tanh>();
    case Unary::gelu:
      return f.template operator()<Unary::gelu>();
    case Unary::gelu_tanh:
      return f.template operator()<Unary::gelu_tanh>();
    case Unary::gelu_fast:
      return f.template operator()<Unary::gelu_fast>();
  }
}

static void unary(Unary op, float* out, const float* x, int64_t n) {
  with_unary(op, [&]<Unary which>() { map(out, n, [](vf a) { return value<which>(a); }, x); });
}
static void unary_vjp(Unary op, float* dx, const float* x, const float* dy, int64_t n) {
  with_unary(op, [&]<Unary which>() { map(dx, n, [](vf a, vf d) { return d * slope<which>(a); }, x, dy); });
}

template <class F>
EDGER1_INLINE void with_gate(Gate op, F f) {
  switch (op) {
    case Gate::swiglu:
      return f.template operator()<Unary::silu>();
    case Gate::geglu:
      return f.template operator()<Unary::gelu>();
    default:
      return f.template operator()<Unary::gelu_tanh>();
  }
}

static void gate(Gate op, float* out, const float* g, const float* x, int64_t n, float alpha, float limit) {
  if (op == Gate::swiglu_oai) {
    vf a = splat(alpha), top = splat(limit), bottom = splat(-limit), one = splat(1.0f);
    map(
        out, n,
        [&](vf u, vf v) {
          u = vmin(u, top);
          return (vmin(vmax(v, bottom), top) + one) * (u * vsigmoid(a * u));
        },
        g, x);
    return;
  }
  with_gate(op, [&]<Unary which>() { map(out, n, [](vf u, vf v) { return value<which>(u) * v; }, g, x); });
}

static void gate_vjp(Gate op, float* d_gate, float* dx, const float* g, const float* x, const float* dy, int64_t n,
                     float alpha, float limit) {
  if (op == Gate::swiglu_oai) {
    vf a = splat(alpha), top = splat(limit), bottom = splat(-limit), one = splat(1.0f), zero{};
    map(
        d_gate, n,
        [&](vf u, vf v, vf d) {
          vf clipped = vmin(u, top);
          vf s = vsigmoid(a * clipped);
          vf grad = d * (vmin(vmax(v, bottom), top) + one) * s * (one + a * clipped * (one - s));
          return u > top ? zero : grad;
        },
        g, x, dy);
    map(
        dx, n,
        [&](vf u, vf v, vf d) {
          vf clipped = vmin(u, top);
          vf grad = d * clipped * vsigmoid(a * clipped);
          return v > top ? zero : v < bottom ? zero : grad;
        },
        g, x, dy);
    return;
  }
  with_gate(op, [&]<Unary which>() {
    map(d_gate, n, [](vf u, vf v, vf d) { return d * v * slope<which>(u); }, g, x, dy);
    map(dx, n, [](vf u, vf d) { return d * value<which>(u); }, g, dy);
  });
}

static float online_softmax(float* scores, int n, float* top, float* sum) {
  float found = maximum(scores, n);
  float best = found > *top ? found : *top;
  float factor = *top == best ? 1.0f : std::exp(*top - best);
  // All scores minus infinity: nothing is visible yet.
  float total = best == -__builtin_inff() ? 0.0f : exp_sum(scores, scores, n, best);
  if (best == -__builtin_inff()) {
    std::memset(scores, 0, sizeof(float) * static_cast<size_t>(n));
  }
  *sum = *sum * factor + total;
  *top = best;
  return factor;
}

static void blend_row(float* acc, float a, const float* x, float b, int n) {
  vf va = splat(a), vb = splat(b);
  map(acc, n, [&](vf u, vf v) { return u * va + v * vb; }, acc, x);
}

static void blend_rows(float* acc, const float* a, const float* x, int64_t stride, const float* b, int count, int n) {
  auto blend = [&](vf sum, auto row) __attribute__((always_inline)) {
    for (int j = 0; j < count; j++) {
      sum = sum * splat(a[j]) + row(j) * splat(b[j]);
    }
    return sum;
  };
  over(
      n, [&](int64_t i) { store(acc + i, blend(load(acc + i), [&](int j) { return load(x + j * stride + i); })); },
      [&](int64_t i, int left) {
        store_n(acc + i, blend(load_n(acc + i, left), [&](int j) { return load_n(x + j * stride + i, left); }), left);
      });
}

} // namespace
} // namespace edger1
