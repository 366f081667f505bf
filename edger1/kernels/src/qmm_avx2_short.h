// The small path's loops for short rows of w on AVX2: several of them side by side.
//
// One row after the other, the sums of a short row wait for each other most of the time. Of longer ones there is enough to
// do in each, and memory is read fastest in one stream. Each sum is made in the order of `steps_block`, with its bits.
#pragma once

#include "qmm_avx2_steps.h"

namespace edger1 {
namespace {

constexpr int64_t kShortRow = 320; // bytes up to which a row is short: measured
constexpr int kShortGroups = 32;
constexpr int kMostShort = 4;      // rows of x, beyond which there is enough to do in each row of w

// Read eight scales or biases as floats, or where not Whole fewer, zeros behind them and nothing that is not theirs.
template <bool Whole>
struct ReadHalves {
  __m128i pairs, place;
  int last; // index of one that has no other to its pair, or -1

  explicit ReadHalves(int count) {
    if constexpr (!Whole) {
      alignas(16) static constexpr int kPairs[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
      alignas(16) static constexpr int8_t kPlaces[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1,
                                                         -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
      pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kPairs + 4 - count / 2));
      place = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kPlaces + 16 - 2 * count));
      last = count % 2 != 0 ? count - 1 : -1;
    }
  }
  __m128i raw(const char* from) const {
    if constexpr (Whole) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
    __m128i found = _mm_maskload_epi32(reinterpret_cast<const int*>(from), pairs);
    if (last >= 0) {
      int one = reinterpret_cast<const uint16_t*>(from)[last];
      found = _mm_or_si128(found, _mm_shuffle_epi8(_mm_cvtsi32_si128(one), place));
    }
    return found;
  }
};

template <bool Whole>
struct ReadF16 : ReadHalves<Whole> {
  using ReadHalves<Whole>::ReadHalves;
  __m256 operator()(const char* from) const {
    return _mm256_cvtph_ps(this->raw(from));
  }
};

template <bool Whole>
struct ReadBf16 : ReadHalves<Whole> {
  using ReadHalves<Whole>::ReadHalves;
  __m256 operator()(const char* from) const {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(this->raw(from)), 16));
  }
};

template <bool Whole>
struct ReadF32 {
  __m256i mask;

  explicit ReadF32(int count) {
    if constexpr (!Whole) {
      alignas(32) static constexpr int kFirst[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
      mask = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirst + 8 - count));
    }
  }
  __m256 operator()(const char* from) const {
    const auto* p = reinterpret_cast<const float*>(from);
    if constexpr (Whole) {
      return _mm256_loadu_ps(p);
    } else {
      return _mm256_maskload_ps(p, mask);
    }
  }
};

template <bool Whole>
struct ReadE8m0 {
  int count;

  explicit ReadE8m0(int count_) : count(count_) {}
  __m256 operator()(const char* from) const {
    if constexpr (!Whole) {
      alignas(32) float each[8] = {};
      convert_any(from, ScaleType::e8m0, count, each);
      return _mm256_load_ps(each);
    }
    __m256i exponents = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    // 0 is 2^-127, the largest of the floats without exponent; 255 is no number.
    __m256i ends = _mm256_or_si256(_mm256_cmpeq_epi32(exponents, _mm256_setzero_si256()),
                                   _mm256_cmpeq_epi32(exponents, _mm256_set1_epi32(255)));
    return _mm256_castsi256_ps(
        _mm256_or_si256(_mm256_slli_epi32(exponents, 23), _mm256_and_si256(ends, _mm256_set1_epi32(1 << 22))));
  }
};

// The scales and biases of `count` <= 8 groups, from group g on, of the rows [n, n + R).
template <class F, int R, bool Whole>
inline void scales_side_by_side(const QuantMatrix& w, int64_t n, int g, int count, __m256 (&scale)[R], __m256 (&bias)[R]) {
  auto all = [&](auto read, int64_t size) {
    const char* scales = static_cast<const char*>(w.scales) + n * w.scale_stride + g * size;
    const char* biases = static_cast<const char*>(w.biases) + n * w.bias_stride + g * size;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      scale[r] = read(scales + r * w.scale_stride);
      if constexpr (!F::fp4) {
        bias[r] = w.bias_ratio != 0 ? _mm256_mul_ps(scale[r], _mm256_set1_ps(w.bias_ratio))
                                    : read(biases + r * w.bias_stride);
      }
    }
  };
  if (w.type == ScaleType::f32) {
    all(ReadF32<Whole>(count), 4);
  } else if (w.type == ScaleType::f16) {
    all(ReadF16<Whole>(count), 2);
  } else if (w.type == ScaleType::bf16) {
    all(ReadBf16<Whole>(count), 2);
  } else {
    all(ReadE8m0<Whole>(count), 1);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    if constexpr (F::fp4) {
      scale[r] = _mm256_mul_ps(scale[r], _mm256_set1_ps(0.5f));
      bias[r] = _mm256_mul_ps(scale[r], _mm256_set1_ps(-12.0f));
    } else if constexpr (F::bits == 8) {
      bias[r] = _mm256_add_ps(bias[r], _mm256_mul_ps(scale[r], _mm256_set1_ps(128.0f)));
    }
  }
}

// out[m][at + r] = the sum of total[r][m]; the last additions of four are done side by side.
template <int M, int R>
[[gnu::always_inline]] inline void store_side_by_side(const f8 (&total)[R][M], int at, float* const* out) {
  constexpr int fours = R * M / 4 * 4;
  auto place = [&](int i) { return out[i / R] + at + i % R; };
  auto each = [&](int i) { return halves(total[i % R][i / R]); };
#pragma GCC unroll 4
  for (int i = 0; i < fours; i += 4) {
    __m128 sums = _mm_hadd_ps(_mm_hadd_ps(each(i), each(i + 1)), _mm_hadd_ps(each(i + 2), each(i + 3)));
    if constexpr (R == 4) {
      _mm_storeu_ps(place(i), sums);
    } else {
      alignas(16) float apart[4];
      _mm_store_ps(apart, sums);
      for (int j = 0; j < 4; j++) {
        *place(i + j) = apart[j];
      }
    }
  }
#pragma GCC unroll 4
  for (int i = fours; i < R * M; i++) {
    __m128 sums = each(i);
    sums = _mm_hadd_ps(sums, sums);
    *place(i) = _mm_cvtss_f32(_mm_hadd_ps(sums, sums));
  }
}

// Rows [n, n + R) of w, which are short, with M rows of x.
template <class F, int M, int R, bool Halves>
inline void rows_side_by_side(const QuantMatrix& w, const char* const (&x)[M], int64_t sums, int64_t n, int at,
                              float* const* out) {
  const int groups = w.k / w.group, whole = w.k / kStep;
  const int shift = w.group > kStep ? 1 : 0; // groups have 32, 64 or 128 columns
  const bool biased = F::bits != 8 || w.bias_ratio != -128.0f;
  alignas(32) float scales[R][kShortGroups + 8];
  const uint8_t* codes = w.codes + n * w.row_bytes;
  f8 total[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      total[r][m] = f8{};
    }
  }
  for (int g = 0; g < groups; g += 8) {
    __m256 scale[R], bias[R];
    if (groups - g >= 8) {
      scales_side_by_side<F, R, true>(w, n, g, 8, scale, bias);
    } else {
      scales_side_by_side<F, R, false>(w, n, g, groups - g, scale, bias);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      _mm256_store_ps(scales[r] + g, scale[r]);
#pragma GCC unroll 4
      for (int m = 0; biased && m < M; m++) {
        f8 offset;
        __builtin_memcpy(&offset, &bias[r], 32);
        total[r][m] = fma8(offset, load8(part(x[m], sums) + g), total[r][m]);
      }
    }
  }
  auto step = [&](int s, bool is_whole) {
    int64_t from = static_cast<int64_t>(s) * kStep * F::bits / 8, of_x = static_cast<int64_t>(s) * kStepBytes;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      StepCodes code = step_codes<F>(codes + r * w.row_bytes + from, is_whole);
      f8 scale = lane_scales<F, Halves>(scales[r] + (Halves ? 2 * s : s >> shift));
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        f8 factor = scale * load8(reinterpret_cast<const float*>(x[m] + of_x + kStep));
        total[r][m] = fma8(step_dot<F>(code, x[m] + of_x), factor, total[r][m]);
      }
    }
  };
  for (int s = 0; s < whole; s++) {
    step(s, true);
  }
  if (Halves && w.k % kStep != 0) {
    step(whole, false);
  }
  store_side_by_side<M, R>(total, at, out);
}

inline bool has_short_rows(const QuantMatrix& w) {
  return w.row_bytes <= kShortRow && w.k / w.group <= kShortGroups;
}

template <class F, int M, bool Halves>
void steps_side_by_side(const QuantMatrix& w, const void* const* prepared, int n0, int n1, float* const* out) {
  constexpr int R = M <= 2 ? 4 : 2;
  const int64_t sums = prepared_layout(w.k, true).sums;
  const char* x[M];
  for (int m = 0; m < M; m++) {
    x[m] = static_cast<const char*>(prepared[m]);
  }
  int n = n0;
  for (; n + R <= n1; n += R) {
    rows_side_by_side<F, M, R, Halves>(w, x, sums, n, n - n0, out);
  }
  for (; n < n1; n++) {
    rows_side_by_side<F, M, 1, Halves>(w, x, sums, n, n - n0, out);
  }
}

} // namespace
} // namespace edger1
