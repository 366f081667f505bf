// The small path's fast loops on AVX2 for 4 and 8 bits: 64 columns a step, up to eight rows of x a pass.
#pragma once

#include "qmm_avx2_short.h"
#include "qmm_avx2_steps.h"

namespace edger1 {
namespace {

// Less than 8 numbers of 16 bits, zeros behind them.
inline __m128i few_halves(const uint16_t* p, int count) {
  auto up_to_four = [](const uint16_t* from, int n) {
    uint64_t word = 0;
    if (n >= 4) {
      return load_bytes<8>(reinterpret_cast<const uint8_t*>(from));
    }
    if (n >= 2) {
      word = load_bytes<4>(reinterpret_cast<const uint8_t*>(from));
    }
    return n % 2 != 0 ? word | static_cast<uint64_t>(from[n - 1]) << (16 * (n - 1)) : word;
  };
  return _mm_set_epi64x(count > 4 ? static_cast<int64_t>(up_to_four(p + 4, count - 4)) : 0,
                        static_cast<int64_t>(up_to_four(p, count)));
}

// `groups` scales or biases as floats, with zeros up to a multiple of 8.
inline void convert_groups(const void* from, ScaleType type, int groups, float* to) {
  if (type == ScaleType::f16 || type == ScaleType::bf16) {
    const auto* half = static_cast<const uint16_t*>(from);
    for (int g = 0; g < groups; g += 8) {
      __m128i raw = groups - g >= 8 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + g))
                                    : few_halves(half + g, groups - g);
      _mm256_storeu_ps(to + g, type == ScaleType::f16
                                   ? _mm256_cvtph_ps(raw)
                                   : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16)));
    }
    return;
  }
  convert_any(from, type, groups, to);
  for (int g = groups; g % 8 != 0; g++) {
    to[g] = 0.0f;
  }
}

// Scales and biases of the groups [g0, g0 + groups) of one row.
template <class F>
inline void step_scales(const QuantMatrix& w, int64_t n, int g0, int groups, float* scales, float* biases) {
  int64_t skip = int64_t{g0} * (w.type == ScaleType::f32 ? 4 : w.type == ScaleType::e8m0 ? 1 : 2);
  convert_groups(static_cast<const char*>(w.scales) + n * w.scale_stride + skip, w.type, groups, scales);
  if (!F::fp4 && w.bias_ratio == 0) {
    convert_groups(static_cast<const char*>(w.biases) + n * w.bias_stride + skip, w.type, groups, biases);
  }
  for (int g = 0; g < groups; g += 8) {
    f8 scale = load8(scales + g);
    if constexpr (F::fp4) {
      scale *= 0.5f;
      store8(scales + g, scale);
      store8(biases + g, scale * -12.0f);
    } else {
      f8 bias = w.bias_ratio != 0 ? scale * w.bias_ratio : load8(biases + g);
      store8(biases + g, F::bits == 8 ? bias + scale * 128.0f : bias);
    }
  }
}

// out[m][at] = the sum of total[m]; four rows' last additions are done side by side.
template <int M>
inline void store_sums(const f8* total, int at, float* const* out) {
  constexpr int fours = M / 4 * 4;
#pragma GCC unroll 2
  for (int m = 0; m < fours; m += 4) {
    __m128 sums = _mm_hadd_ps(_mm_hadd_ps(halves(total[m]), halves(total[m + 1])),
                              _mm_hadd_ps(halves(total[m + 2]), halves(total[m + 3])));
    alignas(16) float each[4];
    _mm_store_ps(each, sums);
    for (int i = 0; i < 4; i++) {
      out[m + i][at] = each[i];
    }
  }
#pragma GCC unroll 3
  for (int m = fours; m < M; m++) {
    __m128 sums = halves(total[m]);
    sums = _mm_hadd_ps(sums, sums);
    out[m][at] = _mm_cvtss_f32(_mm_hadd_ps(sums, sums));
  }
}

template <class F, int M, bool Halves>
void steps_block(const QuantMatrix& w, const void* const* prepared, int n0, int n1, float* const* out) {
  const PreparedLayout layout = prepared_layout(w.k, true);
  const int groups = w.k / w.group, whole = w.k / kStep;
  const int shift = w.group > kStep ? 1 : 0; // groups have 32, 64 or 128 columns
  alignas(32) float scales[kScaleBuffer + 8], biases[kScaleBuffer + 8];
  const char* x[M];
  for (int m = 0; m < M; m++) {
    x[m] = static_cast<const char*>(prepared[m]);
  }
  for (int n = n0; n < n1; n++) {
    const uint8_t* codes = w.codes + n * w.row_bytes;
    f8 total[M];
    for (int m = 0; m < M; m++) {
      total[m] = f8{};
    }
    for (int g0 = 0; g0 < groups; g0 += kScaleBuffer) {
      int here = groups - g0 < kScaleBuffer ? groups - g0 : kScaleBuffer;
      step_scales<F>(w, n, g0, here, scales, biases);
      if (F::bits != 8 || w.bias_ratio != -128.0f) {
        for (int g = 0; g < here; g += 8) {
          f8 bias = load8(biases + g);
          for (int m = 0; m < M; m++) {
            total[m] = fma8(bias, load8(part(x[m], layout.sums) + g0 + g), total[m]);
          }
        }
      }
      int first = static_cast<int>(int64_t{g0} * w.group / kStep), last = (g0 + here) * w.group / kStep;
      auto step = [&](int s, bool is_whole) {
        StepCodes code = step_codes<F>(codes + static_cast<int64_t>(s) * kStep * F::bits / 8, is_whole);
        f8 scale = lane_scales<F, Halves>(scales + (Halves ? 2 * s : s >> shift) - g0);
        int64_t at = static_cast<int64_t>(s) * kStepBytes;
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          f8 factor = scale * load8(reinterpret_cast<const float*>(x[m] + at + kStep));
          total[m] = fma8(step_dot<F>(code, x[m] + at), factor, total[m]);
        }
      };
      for (int s = first; s < last; s++) {
        step(s, true);
      }
      if (Halves && g0 + here == groups && w.k % kStep != 0) {
        step(whole, false);
      }
    }
    store_sums<M>(total, n - n0, out);
  }
}

template <class F, int M>
void steps_of(const QuantMatrix& w, const void* const* prepared, int n0, int n1, float* const* out) {
  if constexpr (M <= kMostShort) {
    if (has_short_rows(w)) {
      return w.group < kStep ? steps_side_by_side<F, M, true>(w, prepared, n0, n1, out)
                             : steps_side_by_side<F, M, false>(w, prepared, n0, n1, out);
    }
  }
  w.group < kStep ? steps_block<F, M, true>(w, prepared, n0, n1, out)
                  : steps_block<F, M, false>(w, prepared, n0, n1, out);
}

template <class F>
void rows_in_steps(const QuantMatrix& w, const void* const* prepared, int m, int n0, int n1, float* const* out) {
  using Block = void (*)(const QuantMatrix&, const void* const*, int, int, float* const*);
  static constexpr Block blocks[kMostAtOnce] = {steps_of<F, 1>, steps_of<F, 2>, steps_of<F, 3>, steps_of<F, 4>,
                                                steps_of<F, 5>, steps_of<F, 6>, steps_of<F, 7>, steps_of<F, 8>};
  for (int done = 0; done < m; done += kMostAtOnce) {
    int size = m - done < kMostAtOnce ? m - done : kMostAtOnce;
    blocks[size - 1](w, prepared + done, n0, n1, out + done);
  }
}

void rows_steps(const QuantMatrix& w, const void* const* prepared, int m, int n0, int n1, float* const* out) {
  if (!in_steps(w)) {
    return rows<true>(w, prepared, m, n0, n1, out);
  }
  w.bits == 8 ? rows_in_steps<Format<8, false>>(w, prepared, m, n0, n1, out)
      : w.fp4 ? rows_in_steps<Format<4, true>>(w, prepared, m, n0, n1, out)
              : rows_in_steps<Format<4, false>>(w, prepared, m, n0, n1, out);
}

constexpr QmmKernels with_steps(QmmKernels made) {
  made.prepare_fast = prepare_steps;
  made.rows_fast = rows_steps;
  return made;
}

} // namespace
} // namespace edger1
