// The small path with AVX-512 for several rows of x: a few rows of W meet them at a time.
//
// Prepared rows of a wide matrix do not fit the first-level cache together. Were they read again for each row of W, the
// second-level cache would set the pace; here each of their lines serves several rows of W. What is computed for a row of
// x and a row of W is what qmm_avx512_rows.h computes for them, operation by operation.
#pragma once

#include "qmm_avx512_rows.h"

namespace edger1 {
namespace {

// How far ahead of `at` bytes into one of N rows that are read side by side, each `row_bytes` long, to ask for memory: in
// the same row, or, near its end, in the one that is N rows further.
template <int N>
inline int64_t ahead_of(int64_t at, int64_t distance, int64_t row_bytes) {
  return at + distance < row_bytes ? distance : distance + (N - 1) * row_bytes;
}

// N neighbouring rows of W from n on, and what is the same for all steps through them.
template <class F, int N>
struct SideBySide {
  const uint8_t* codes[N];
  const void *scales[N], *biases[N];
  const QuantMatrix& w;
  const bool biases_apart, in_order;
  const int shift, blocks, groups, scale_bytes;
  const __m512i spread_groups;

  SideBySide(const QuantMatrix& matrix, int n)
      : w(matrix), biases_apart(!matrix.fp4 && matrix.bias_ratio == 0), in_order(N * matrix.row_bytes <= 4 * kPrefetchBytes),
        shift(matrix.group == kBlock ? 0 : matrix.group == 2 * kBlock ? 1 : 2), blocks(matrix.k / kBlock),
        groups(matrix.k / matrix.group),
        scale_bytes(matrix.type == ScaleType::f32 ? 4 : matrix.type == ScaleType::e8m0 ? 1 : 2),
        spread_groups(_mm512_srli_epi32(iota(), static_cast<unsigned>(shift))) {
    for (int i = 0; i < N; i++) {
      codes[i] = codes_row(w, n + i);
      scales[i] = scales_row(w, n + i);
      biases[i] = biases_row(w, n + i);
    }
  }

  // Inlined early, or GCC takes a function that only asks for memory for one without effect.
  __attribute__((always_inline)) void prefetch(const void* const* base, int64_t stride, int index) const {
    int64_t at = int64_t{index} * scale_bytes, further = ahead_of<N>(at, kPrefetchScaleBytes, stride);
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
      _mm_prefetch(static_cast<const char*>(base[i]) + at + further, _MM_HINT_T0);
    }
  }

  // Asks for codes while those at `byte` are used: for those `further` on, or of short rows for the next N, in the order in
  // which they lie.
  template <int Bytes>
  __attribute__((always_inline)) void prefetch_codes(int64_t byte, int64_t further) const {
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
      const uint8_t* to = in_order ? codes[0] + N * (w.row_bytes + byte) + i * Bytes : codes[i] + byte + further;
#pragma GCC unroll 2
      for (int line = 0; line < Bytes; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(to + line), _MM_HINT_T0);
      }
    }
  }

  // Each total begins with the biases' part.
  template <int M>
  void add_biases(const void* const* prepared, int64_t sums, __m512 (*total)[M]) const {
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        total[i][m] = _mm512_setzero_ps();
      }
    }
    for (int g = 0; g < groups; g += 16) {
      if (biases_apart) {
        prefetch(biases, w.bias_stride, g);
      }
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) {
        __m512 bias = load_biases(w, scales[i], biases[i], g, first16(groups - g));
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          total[i][m] = _mm512_fmadd_ps(bias, _mm512_loadu_ps(part(prepared[m], sums) + g), total[i][m]);
        }
      }
    }
  }

  // The scales of 16 blocks from b on, one a lane.
  void spread_scales(int b, int here, __m512* to) const {
    const int per = 1 << shift;
    prefetch(scales, w.scale_stride, b >> shift);
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
      __m512 scale = load_scales(scales[i], w.type, b >> shift, first16((here + per - 1) >> shift));
      to[i] = _mm512_permutexvar_ps(spread_groups, scale);
    }
  }
};

// The sums of 16 vectors, each added up as _mm512_reduce_add_ps adds it: that of v[4 * q + i] is in lane 4 * q + i.
inline __m512 reduce_each(const __m512* v) {
  // Where the steps below put what they were given.
  constexpr int from[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    t[from[i]] = v[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(t[i], t[i + 8], 0x44), _mm512_shuffle_f32x4(t[i], t[i + 8], 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    t[i] = _mm512_add_ps(_mm512_shuffle_ps(t[i], t[i + 2], 0x44), _mm512_shuffle_ps(t[i], t[i + 2], 0xee));
  }
  return _mm512_add_ps(_mm512_shuffle_ps(t[0], t[1], 0x88), _mm512_shuffle_ps(t[0], t[1], 0xdd));
}

// Writes the sums of totals[i][m] to out[m][at + i].
template <int N, int M, class Total>
inline void put_sums(float* const* out, int at, Total&& total) {
  if constexpr (N == 4 && M == 4) {
    __m512 v[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) {
      v[j] = total(j % 4, j / 4);
    }
    __m512 sums = reduce_each(v);
    _mm_storeu_ps(out[0] + at, _mm512_castps512_ps128(sums));
    _mm_storeu_ps(out[1] + at, _mm512_extractf32x4_ps(sums, 1));
    _mm_storeu_ps(out[2] + at, _mm512_extractf32x4_ps(sums, 2));
    _mm_storeu_ps(out[3] + at, _mm512_extractf32x4_ps(sums, 3));
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        out[m][at + i] = _mm512_reduce_add_ps(total(i, m));
      }
    }
  }
}

template <class F, int N, int M>
void fast_tile(const QuantMatrix& w, const FastStep<F>& step, const void* const* prepared, int n, int n0,
               float* const* out) {
  const PreparedLayout layout = prepared_layout(w.k, true);
  const SideBySide<F, N> rows(w, n);
  const __m512i spread_blocks = _mm512_srli_epi32(iota(), FastStep<F>::two ? 2 : 3);
  const int8_t* x[M];
  const float* x_scales[M];
  for (int m = 0; m < M; m++) {
    x[m] = static_cast<const int8_t*>(prepared[m]);
    x_scales[m] = part(prepared[m], layout.scales);
  }
  __m512 total[N][M];
  rows.template add_biases<M>(prepared, layout.sums, total);
  for (int b = 0; b < rows.blocks; b += 16) {
    int here = rows.blocks - b < 16 ? rows.blocks - b : 16;
    __m512 scale[N];
    rows.spread_scales(b, here, scale);
    int64_t byte = int64_t{b} * 4 * F::bits, further = ahead_of<N>(byte, kPrefetchBytes, w.row_bytes);
    for (int left = here * 4 * F::bits, j = 0; left > 0; j++, left -= kFastBytes<F>, byte += kFastBytes<F>) {
      __m512i lanes = _mm512_add_epi32(spread_blocks, _mm512_set1_epi32(j * kFastCodes<F> / kBlock));
      int64_t column = int64_t{b} * kBlock + j * kFastCodes<F>;
      rows.template prefetch_codes<kFastBytes<F>>(byte, further);
      __m512i first[N], second[N];
      __m512 weight_scale[N];
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) {
        step.load(rows.codes[i] + byte, left, first[i], second[i]);
        weight_scale[i] = _mm512_permutexvar_ps(lanes, scale[i]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        __m512 x_scale = _mm512_loadu_ps(x_scales[m] + column / kFastLane<F>);
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
          total[i][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(step.dot(first[i], second[i], x[m] + column)),
                                        _mm512_mul_ps(weight_scale[i], x_scale), total[i][m]);
        }
      }
    }
  }
  put_sums<N, M>(out, n - n0, [&](int i, int m) { return total[i][m]; });
}

// Four bits only.
template <class F, int N, int M>
void exact_tile(const QuantMatrix& w, const void* const* prepared, int n, int n0, float* const* out) {
  const PreparedLayout layout = prepared_layout(w.k, false);
  const SideBySide<F, N> rows(w, n);
  const __m512i spread_blocks = _mm512_srli_epi32(iota(), 2);
  const __m512 table = F::fp4 ? _mm512_setr_ps(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)
                              : _mm512_cvtepi32_ps(iota());
  const float* x[M];
  for (int m = 0; m < M; m++) {
    x[m] = static_cast<const float*>(prepared[m]);
  }
  __m512 total[N][M];
  rows.template add_biases<M>(prepared, layout.sums, total);
  for (int b = 0; b < rows.blocks; b += 16) {
    int here = rows.blocks - b < 16 ? rows.blocks - b : 16;
    __m512 scale[N];
    rows.spread_scales(b, here, scale);
    int64_t byte = int64_t{b} * 4 * F::bits, further = ahead_of<N>(byte, kPrefetchBytes, w.row_bytes);
    for (int left = here * 4 * F::bits, j = 0; left > 0; j++, left -= kStepBytes<F>, byte += kStepBytes<F>) {
      int64_t column = int64_t{b} * kBlock + j * kStepCodes<F>;
      rows.template prefetch_codes<kStepBytes<F>>(byte, further);
      __m512i raw[N];
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) {
        raw[i] = _mm512_maskz_loadu_epi8(first64(left), rows.codes[i] + byte);
      }
      __m512 sum[N][M];
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) {
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          sum[i][m] = _mm512_setzero_ps();
        }
      }
      // Not unrolled: the compiler would take the products apart, and run out of registers.
#pragma GCC unroll 1
      for (int c = 0; c < 8; c++) {
        __m512 value[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
          value[i] = _mm512_permutexvar_ps(raw[i], table);
          raw[i] = _mm512_srli_epi32(raw[i], 4);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          __m512 elements = _mm512_loadu_ps(x[m] + column + 16 * c);
          __asm__("" : "+v"(elements));  // read once, not once in each product
#pragma GCC unroll 4
          for (int i = 0; i < N; i++) {
            sum[i][m] = _mm512_fmadd_ps(value[i], elements, sum[i][m]);
          }
        }
      }
      __m512i lanes = _mm512_add_epi32(spread_blocks, _mm512_set1_epi32(4 * j));
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) {
        __m512 factor = _mm512_permutexvar_ps(lanes, scale[i]);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          total[i][m] = _mm512_fmadd_ps(sum[i][m], factor, total[i][m]);
        }
      }
    }
  }
  put_sums<N, M>(out, n - n0, [&](int i, int m) { return total[i][m]; });
}

// Whether M rows of x meet several rows of W at a time. One row does where it is wider than the first-level cache has room
// for, and the arithmetic takes longer than reading W.
template <class F, bool Fast, int M>
bool side_by_side(int k) {
  if constexpr (M == 1) {
    constexpr int wide = 6 << 10;
    return !Fast && kNibbles<F> && k > wide;
  }
  return Fast || kNibbles<F>;
}

// M rows of x against rows [n0, n1) of W.
template <class F, bool Fast, int M>
void rows_block(const QuantMatrix& w, const void* const* prepared, int n0, int n1, float* const* out) {
  constexpr int together = M == 8 ? 2 : 4;
  int n = n0;
  if (side_by_side<F, Fast, M>(w.k)) {
    if constexpr (Fast && M > 1) {
      const FastStep<F> step;
      for (; n + together <= n1; n += together) {
        fast_tile<F, together, M>(w, step, prepared, n, n0, out);
      }
    } else if constexpr (!Fast && kNibbles<F>) {
      for (; n + together <= n1; n += together) {
        exact_tile<F, together, M>(w, prepared, n, n0, out);
      }
    }
  }
  if (n == n1) {
    return;
  }
  float* rest[M];
  for (int m = 0; m < M; m++) {
    rest[m] = out[m] + (n - n0);
  }
  (Fast ? rows_fast_block<F, M> : rows_exact_block<F, M>)(w, prepared, n, n1, rest);
}

// Rows of x in blocks of 8, 4, 2 or 1; a block that is not full computes its first row more than once.
template <class F, bool Fast>
void rows(const QuantMatrix& w, const void* const* prepared, int m, int n0, int n1, float* const* out) {
  if (Fast && m == 1 && row_fast<F>(w, prepared[0], n0, n1, out[0])) {
    return;
  }
  for (int done = 0; done < m;) {
    int left = m - done;
    int size = left > 4 ? 8 : left > 2 ? 4 : left;
    const void* x[8];
    float* to[8];
    for (int i = 0; i < size; i++) {
      x[i] = prepared[i < left ? done + i : done];
      to[i] = out[i < left ? done + i : done];
    }
    (size == 8   ? rows_block<F, Fast, 8>
     : size == 4 ? rows_block<F, Fast, 4>
     : size == 2 ? rows_block<F, Fast, 2>
                 : rows_block<F, Fast, 1>)(w, x, n0, n1, to);
    done += size;
  }
}

void rows_fast(const QuantMatrix& w, const void* const* prepared, int m, int n0, int n1, float* const* out) {
  for_format(w, [&](auto format) { rows<decltype(format), true>(w, prepared, m, n0, n1, out); });
}

void rows_exact(const QuantMatrix& w, const void* const* prepared, int m, int n0, int n1, float* const* out) {
  for_format(w, [&](auto format) { rows<decltype(format), false>(w, prepared, m, n0, n1, out); });
}

} // namespace
} // namespace edger1
