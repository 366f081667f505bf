// Products of operands packed by bf16_pack.h in vectors of bf16 (AVX512-BF16), which have twice the rate of f32. Included by
// sources compiled for it only; everything is in an anonymous namespace, as in bf16_pack.h.
//
// An element of the result is one chain of additions over k, whatever rows and columns it is computed with.
#pragma once

#include <type_traits>

#include "bf16_pack.h"

namespace edger1 {
namespace {

// Rows of A that go over a panel of B together: 24 sums of 16 columns, enough to hide a product's latency.
constexpr int kRowsAtOnce = 12;

inline __m512bh pair_of_all(const uint8_t* from) {
  int32_t pair;
  __builtin_memcpy(&pair, from, 4);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

// c (R x up to 32) = or += rows of A from `row` of its panel on, times a panel of B.
template <int R>
inline void multiply(float* c, int64_t c_stride, const uint8_t* a, int row, const uint8_t* b, int steps,
                     __mmask16 low, __mmask16 high, bool accumulate) {
  __m512 sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    sums[r][0] = accumulate ? _mm512_maskz_loadu_ps(low, c + r * c_stride) : _mm512_setzero_ps();
    sums[r][1] = accumulate ? _mm512_maskz_loadu_ps(high, c + r * c_stride + 16) : _mm512_setzero_ps();
  }
  const uint8_t* rows[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    rows[r] = a + (row + r) / 16 * 1024 + (row + r) % 16 * 64;
  }
  for (int step = 0; step < steps; step++) {
    for (int pair = 0; pair < 16; pair++) {
      auto b0 = reinterpret_cast<__m512bh>(_mm512_load_si512(b + pair * 64));
      auto b1 = reinterpret_cast<__m512bh>(_mm512_load_si512(b + pair * 64 + 1024));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        __m512bh x = pair_of_all(rows[r] + step * kStepBytes + pair * 4);
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, b0);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, b1);
      }
    }
    b += kStepBytes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    _mm512_mask_storeu_ps(c + r * c_stride, low, sums[r][0]);
    _mm512_mask_storeu_ps(c + r * c_stride + 16, high, sums[r][1]);
  }
}

void multiply_panels(float* c, int64_t c_stride, const void* a_in, const void* b_in, int m, int n, int k, bool accumulate) {
  const auto *a = static_cast<const uint8_t*>(a_in), *b = static_cast<const uint8_t*>(b_in);
  const int steps = static_cast<int>(ceil32(k));
  for (int j = 0; j < n; j += kPanelRows) {
    const uint8_t* panel = b + j / kPanelRows * steps * kStepBytes;
    const __mmask16 low = first16(n - j < 16 ? n - j : 16), high = first16(n - j < 16 ? 0 : n - j < 32 ? n - j - 16 : 16);
    for (int i = 0; i < m; i += kPanelRows) {
      const uint8_t* rows = a + i / kPanelRows * steps * kStepBytes;
      const int here = m - i < kPanelRows ? m - i : kPanelRows;
      int row = 0;
      auto take = [&](auto count) {
        constexpr int R = decltype(count)::value;
        for (; here - row >= R; row += R) {
          multiply<R>(c + (i + row) * c_stride + j, c_stride, rows, row, panel, steps, low, high, accumulate);
        }
      };
      take(std::integral_constant<int, kRowsAtOnce>());
      take(std::integral_constant<int, 8>());
      take(std::integral_constant<int, 4>());
      take(std::integral_constant<int, 1>());
    }
  }
}

} // namespace
} // namespace edger1
