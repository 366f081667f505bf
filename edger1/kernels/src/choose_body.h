// Drawing from a vocabulary, for one instruction set; see choose_ops.h.
#pragma once

#include "choose_ops.h"
#include "simd.h"

namespace edger1 {
namespace {

// One bit a lane of a comparison's result.
EDGER1_INLINE uint32_t bits_of(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t found = 0;
  for (int i = 0; i < kWidth; i++) {
    found |= static_cast<uint32_t>(mask[i] & 1) << i;
  }
  return found;
#endif
}

EDGER1_INLINE vi lanes() {
  vi lane;
  for (int i = 0; i < kWidth; i++) {
    lane[i] = i;
  }
  return lane;
}

// The first n elements; the rest reads as `filler`.
EDGER1_INLINE vf load_or(const float* p, int n, float filler) {
  return lanes() < isplat(n) ? load_n(p, n) : splat(filler);
}

constexpr float kNothing = -__builtin_inff();

// Calls f(i, x) for blocks of x, the last filled up with NaN, which compares false with everything.
template <class F>
EDGER1_INLINE void blocks(const float* x, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    f(i, load(x + i));
  }
  if (i < n) {
    f(i, load_or(x + i, static_cast<int>(n - i), __builtin_nanf("")));
  }
}

static void subtract(float* out, const float* x, float shift, int64_t n) {
  vf s = splat(shift);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    store(out + i, load(x + i) - s);
  }
  for (; i < n; i++) {
    out[i] = x[i] - shift;
  }
}

static Masses masses(float* e, const float* x, int64_t n, float top, const float* distances) {
  vf mass[kLevels] = {}, total{}, limit[kLevels];
  vi count[kLevels] = {};
  for (int l = 0; l < kLevels; l++) {
    limit[l] = splat(top - distances[l]);
  }
  auto add = [&](vf v, vf p) {
    total += p;
    for (int l = 0; l < kLevels; l++) {
      vi in = v >= limit[l];
      mass[l] += as_float(as_int(p) & in);
      count[l] -= in;
    }
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    vf v = load(x + i), p = vexp(v);
    store(e + i, p);
    add(v, p);
  }
  if (i < n) {
    int left = static_cast<int>(n - i);
    vf v = load_or(x + i, left, kNothing), p = vexp(v);
    store_n(e + i, p, left);
    add(v, p);
  }
  Masses found{};
  found.total = hsum(total);
  for (int l = 0; l < kLevels; l++) {
    found.mass[l] = hsum(mass[l]);
    for (int i = 0; i < kWidth; i++) {
      found.count[l] += count[l][i];
    }
  }
  return found;
}

static int64_t at_least(uint32_t* out, const float* x, int64_t n, float limit) {
  int64_t size = 0;
  vf l = splat(limit);
  blocks(x, n, [&](int64_t i, vf v) {
    uint32_t in = bits_of(v >= l);
#if defined(__AVX512F__)
    __m512i index = (__m512i)(lanes() + isplat(static_cast<int32_t>(i)));
    // Zen 4 takes more than a hundred cycles to compress into memory, and two in a register.
    _mm512_mask_storeu_epi32(out + size, static_cast<__mmask16>((1u << __builtin_popcount(in)) - 1),
                             _mm512_maskz_compress_epi32(static_cast<__mmask16>(in), index));
    size += __builtin_popcount(in);
#else
    for (; in; in &= in - 1) {
      out[size++] = static_cast<uint32_t>(i + __builtin_ctz(in));
    }
#endif
  });
  return size;
}

static int64_t count_at_least(const float* x, int64_t n, float limit) {
  vf l = splat(limit);
  vi count{};
  blocks(x, n, [&](int64_t, vf v) { count -= v >= l; });
  int64_t found = 0;
  for (int j = 0; j < kWidth; j++) {
    found += count[j];
  }
  return found;
}

static int64_t gather_above(float* out, int64_t size, int64_t room, const float* x, int64_t* begin, int64_t n,
                            float limit, bool equal) {
  vf l = splat(limit);
  int64_t i = *begin;
  for (; i < n && size + kWidth <= room; i += kWidth) {
    vf v = i + kWidth <= n ? load(x + i) : load_or(x + i, static_cast<int>(n - i), __builtin_nanf(""));
    for (uint32_t in = bits_of(equal ? v >= l : v > l); in; in &= in - 1) {
      out[size++] = v[__builtin_ctz(in)];
    }
  }
  *begin = i < n ? i : n;
  return size;
}

static float exponentials(float* out, const float* x, int64_t n, float factor, float shift) {
  vf f = splat(factor), top = splat(shift), sum{};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    vf e = vexp(load(x + i) * f - top);
    store(out + i, e);
    sum += e;
  }
  if (i < n) {
    int left = static_cast<int>(n - i);
    vf e = vexp(load_or(x + i, left, kNothing) * f - top);
    store_n(out + i, e, left);
    sum += e;
  }
  return hsum(sum);
}

} // namespace

// The table of the including source.
#define EDGER1_CHOOSE_OPS                                                                                              \
  {                                                                                                                    \
    subtract, masses, at_least, count_at_least, gather_above, exponentials                                                     \
  }

} // namespace edger1
