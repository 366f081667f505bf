// The small path with AVX-512: up to 16 rows of x against rows of W, at the speed of memory.
//
// Every weight row is read once, front to back, and meets all rows of x while it is in registers. A row's own arithmetic
// (which products are added in which order) does not depend on how many rows there are.
//
// Four bits: 64 bytes hold 128 codes. `fast` splits them into even and odd codes, and prepared rows have their even and
// odd elements apart. `exact` takes code i of the eight in each of the 16 words as an index into a table of 16 floats,
// and prepared rows are transposed to match. Four words hold 32 codes either way, so four lanes share a block's
// scale. In `fast` a lane adds up eight codes in a row, which share one scale of x.
//
// Eight bits, `fast`: 128 codes fill two vectors, which go apart into even and odd words of four, so that a lane adds up
// eight in a row here too; prepared rows have their even and odd words apart.
#pragma once

#include "qmm_avx512_common.h"

namespace edger1 {
namespace {

template <class F>
constexpr bool kNibbles = F::bits == 4;

// Codes that one 512-bit step covers, and bytes of them.
template <class F>
constexpr int kStepCodes = kNibbles<F> ? 128 : 64;
template <class F>
constexpr int kStepBytes = kStepCodes<F> * F::bits / 8;

// The same in `fast`.
template <class F>
constexpr int kFastCodes = F::bits == 4 || F::bits == 8 ? 128 : 64;
template <class F>
constexpr int kFastLane = kFastCodes<F> / 16;
template <class F>
constexpr int kFastBytes = kFastCodes<F> * F::bits / 8;

inline const float* part(const void* prepared, int64_t offset) {
  return reinterpret_cast<const float*>(static_cast<const char*>(prepared) + offset);
}

// How far ahead of its use a weight is asked for: the processor's own prefetchers do not keep enough lines in flight to
// hide memory behind this much arithmetic a line, and far more than 3 KB ahead the lines asked for are in each other's
// way. Reading ahead of the end of a matrix has no effect.
constexpr int kPrefetchBytes = 2048;
constexpr int kPrefetchScaleBytes = 512;

// The same for scales or biases, which are fewer.
inline void ahead(const void* base, int64_t index, ScaleType type) {
  int64_t size = type == ScaleType::f32 ? 4 : type == ScaleType::e8m0 ? 1 : 2;
  _mm_prefetch(static_cast<const char*>(base) + index * size + kPrefetchScaleBytes, _MM_HINT_T0);
}

template <class F>
struct FastStep {
  static constexpr bool two = kFastCodes<F> == 128;
  Decoder<F> decode;
  __m512i low = _mm512_set1_epi8(15);
  __m512i even = _mm512_slli_epi32(iota(), 1);
  __m512i odd = _mm512_or_si512(_mm512_slli_epi32(iota(), 1), _mm512_set1_epi32(1));

  // The bytes of a step, of which `left` are there, as one or two vectors of codes.
  __attribute__((always_inline)) void load(const uint8_t* p, int left, __m512i& first, __m512i& second) const {
    if constexpr (kNibbles<F>) {
      __m512i raw = _mm512_maskz_loadu_epi8(first64(left), p);
      first = _mm512_and_si512(raw, low);
      second = _mm512_and_si512(_mm512_srli_epi16(raw, 4), low);
      if constexpr (F::fp4) {
        first = _mm512_shuffle_epi8(fp4_table(), first);
        second = _mm512_shuffle_epi8(fp4_table(), second);
      }
    } else if constexpr (two) {
      __m512i front = _mm512_maskz_loadu_epi8(first64(left), p);
      __m512i back = _mm512_maskz_loadu_epi8(first64(left > 64 ? left - 64 : 0), p + 64);
      first = _mm512_permutex2var_epi32(front, even, back);
      second = _mm512_permutex2var_epi32(front, odd, back);
    } else {
      first = decode(p, first64(left));
    }
  }

  inline __m512i dot(__m512i first, __m512i second, const int8_t* x) const {
    __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, _mm512_loadu_si512(x));
    if constexpr (two) {
      sum = _mm512_dpbusd_epi32(sum, second, _mm512_loadu_si512(x + 64));
    }
    return sum;
  }
};

template <class F, int M>
void rows_fast_block(const QuantMatrix& w, const void* const* prepared, int n0, int n1, float* const* out) {
  constexpr int steps = kSuperBlock / kFastCodes<F>;
  const FastStep<F> step;
  const PreparedLayout layout = prepared_layout(w.k, true);
  const int per = w.group / kBlock;
  const int shift = per == 1 ? 0 : per == 2 ? 1 : 2;
  const int blocks = w.k / kBlock, groups = w.k / w.group;
  const bool biases_apart = !w.fp4 && w.bias_ratio == 0;
  const __m512i spread_groups = _mm512_srli_epi32(iota(), static_cast<unsigned>(shift));
  const __m512i spread_blocks = _mm512_srli_epi32(iota(), FastStep<F>::two ? 2 : 3);
  for (int n = n0; n < n1; n++) {
    const uint8_t* codes = codes_row(w, n);
    const void* scales = scales_row(w, n);
    const void* biases = biases_row(w, n);
    __m512 total[M];
    for (int m = 0; m < M; m++) {
      total[m] = _mm512_setzero_ps();
    }
    for (int g = 0; g < groups; g += 16) {
      __m512 bias = load_biases(w, scales, biases, g, first16(groups - g));
      if (biases_apart) {
        ahead(biases, g, w.type);
      }
      for (int m = 0; m < M; m++) {
        total[m] = _mm512_fmadd_ps(bias, _mm512_loadu_ps(part(prepared[m], layout.sums) + g), total[m]);
      }
    }
    for (int b = 0; b < blocks; b += 16) {
      int here = blocks - b < 16 ? blocks - b : 16;
      __m512 scale = load_scales(scales, w.type, b >> shift, first16((here + per - 1) >> shift));
      scale = _mm512_permutexvar_ps(spread_groups, scale);
      ahead(scales, b >> shift, w.type);
      const uint8_t* p = codes + static_cast<int64_t>(b) * 4 * F::bits;
      int64_t at = static_cast<int64_t>(b) * kBlock;
      auto one = [&](int j, int left) __attribute__((always_inline)) {
        __m512i first, second;
        for (int line = 0; line < kFastBytes<F>; line += 64) {
          _mm_prefetch(reinterpret_cast<const char*>(p + j * kFastBytes<F> + line + kPrefetchBytes), _MM_HINT_T0);
        }
        step.load(p + j * kFastBytes<F>, left, first, second);
        __m512i lanes = _mm512_add_epi32(spread_blocks, _mm512_set1_epi32(j * kFastCodes<F> / kBlock));
        __m512 weight_scale = _mm512_permutexvar_ps(lanes, scale);
        int64_t column = at + j * kFastCodes<F>;
        for (int m = 0; m < M; m++) {
          const int8_t* x = static_cast<const int8_t*>(prepared[m]) + column;
          __m512 x_scale = _mm512_loadu_ps(part(prepared[m], layout.scales) + column / kFastLane<F>);
          total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(step.dot(first, second, x)),
                                     _mm512_mul_ps(weight_scale, x_scale), total[m]);
        }
      };
      if (here == 16) {
#pragma GCC unroll 8
        for (int j = 0; j < steps; j++) {
          one(j, kFastBytes<F>);
        }
      } else {
        for (int left = here * 4 * F::bits, j = 0; left > 0; j++, left -= kFastBytes<F>) {
          one(j, left);
        }
      }
    }
    for (int m = 0; m < M; m++) {
      out[m][n - n0] = _mm512_reduce_add_ps(total[m]);
    }
  }
}

// The same for one row of x and the usual formats, as decoding has it: the scales' type and the blocks of a group
// (1 << Shift) are known, and scales become floats in a loop of their own, so that nothing stands between the codes.
//
// On AMD's processors weights are asked for further ahead and to the second-level cache: measured on Zen 4, which keeps few
// lines on the way to the first-level one.
template <class F, ScaleType Type, int Shift, bool Amd>
void row_fast(const QuantMatrix& matrix, const void* prepared, int n0, int n1, float* out) {
  constexpr int run = 512; // blocks whose scales are converted at once
  constexpr int steps = kSuperBlock / kFastCodes<F>;
  constexpr int scale_bytes = Type == ScaleType::f32 ? 4 : 2;
  constexpr int codes_ahead = Amd ? 2 * kPrefetchBytes : kPrefetchBytes;
  constexpr int scales_ahead = Amd ? 2 * kPrefetchScaleBytes : kPrefetchScaleBytes;
  auto ask = [](const void* p) __attribute__((always_inline)) { __builtin_prefetch(p, 0, Amd ? 2 : 3); };
  const QuantMatrix w = matrix; // a copy, which writing results cannot change
  const FastStep<F> step;
  const PreparedLayout layout = prepared_layout(w.k, true);
  const float* sums = part(prepared, layout.sums);
  const int blocks = w.k / kBlock;
  const bool apart = w.bias_ratio == 0;
  const __m512 ratio = _mm512_set1_ps(w.bias_ratio);
  __m512i lanes[steps];
  for (int j = 0; j < steps; j++) {
    lanes[j] = _mm512_add_epi32(_mm512_srli_epi32(iota(), FastStep<F>::two ? 2 : 3),
                                _mm512_set1_epi32(j * kFastCodes<F> / kBlock));
  }
  alignas(64) float scales[run + 48];
  for (int n = n0; n < n1; n++) {
    const char* row_scales = static_cast<const char*>(scales_row(w, n));
    const char* row_biases = static_cast<const char*>(biases_row(w, n));
    __m512 total = _mm512_setzero_ps();
    for (int first = 0; first < blocks; first += run) {
      const int count = blocks - first < run ? blocks - first : run;
      const int begin = first >> Shift, end = (first + count) >> Shift;
      float* to = scales;
      auto sixteen = [&](int g, __mmask16 mask) __attribute__((always_inline)) {
        __m512 scale = load_scales(row_scales, Type, g, mask);
        __m512 bias = apart ? load_scales(row_biases, Type, g, mask) : _mm512_mul_ps(scale, ratio);
        total = _mm512_fmadd_ps(bias, _mm512_loadu_ps(sums + g), total);
        if constexpr (Shift == 0) {
          _mm512_store_ps(to, scale);
        } else {
#pragma GCC unroll 4
          for (int j = 0; j < 1 << Shift; j++) {
            __m512i from = _mm512_add_epi32(_mm512_srli_epi32(iota(), Shift), _mm512_set1_epi32(j * (16 >> Shift)));
            _mm512_store_ps(to + 16 * j, _mm512_permutexvar_ps(from, scale));
          }
        }
        to += 16 << Shift;
      };
      int g = begin;
      for (; g + 16 <= end; g += 16) {
        sixteen(g, 0xffff);
      }
      if (g < end) {
        sixteen(g, first16(end - g));
      }
      for (int at = begin * scale_bytes; at < end * scale_bytes; at += 64) {
        ask(row_scales + at + scales_ahead);
        if (apart) {
          ask(row_biases + at + scales_ahead);
        }
      }
      const uint8_t* p = codes_row(w, n) + static_cast<int64_t>(first) * 4 * F::bits;
      const int8_t* x = static_cast<const int8_t*>(prepared) + static_cast<int64_t>(first) * kBlock;
      const float* x_scales = part(prepared, layout.scales) + static_cast<int64_t>(first) * (kBlock / kFastLane<F>);
      auto one = [&](__m512i lane, __m512 scale, int left) __attribute__((always_inline)) {
        __m512i low, high;
        for (int line = 0; line < kFastBytes<F>; line += 64) {
          ask(p + line + codes_ahead);
        }
        step.load(p, left, low, high);
        __m512 weight_scale = _mm512_permutexvar_ps(lane, scale);
        total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(step.dot(low, high, x)),
                                _mm512_mul_ps(weight_scale, _mm512_loadu_ps(x_scales)), total);
        p += kFastBytes<F>;
        x += kFastCodes<F>;
        x_scales += 16;
      };
      int b = 0;
      for (; b + 16 <= count; b += 16) {
        __m512 scale = _mm512_load_ps(scales + b);
#pragma GCC unroll 8
        for (int j = 0; j < steps; j++) {
          one(lanes[j], scale, kFastBytes<F>);
        }
      }
      if (b < count) {
        __m512 scale = _mm512_load_ps(scales + b);
        for (int left = (count - b) * 4 * F::bits, j = 0; left > 0; j++, left -= kFastBytes<F>) {
          one(lanes[j], scale, left);
        }
      }
    }
    out[n - n0] = _mm512_reduce_add_ps(total);
  }
}

template <class F, ScaleType Type>
void row_fast(const QuantMatrix& w, const void* prepared, int n0, int n1, float* out) {
  static const bool amd = __builtin_cpu_is("amd");
  auto run = [&]<int Shift>() {
    (amd ? row_fast<F, Type, Shift, true> : row_fast<F, Type, Shift, false>)(w, prepared, n0, n1, out);
  };
  w.group == 32 ? run.template operator()<0>() : w.group == 64 ? run.template operator()<1>() : run.template operator()<2>();
}

// Whether there is such a loop for the matrix; it gives the bits of the general one.
template <class F>
bool row_fast(const QuantMatrix& w, const void* prepared, int n0, int n1, float* out) {
  if constexpr (!F::fp4 && (F::bits == 4 || F::bits == 8)) {
    (w.type == ScaleType::f32       ? row_fast<F, ScaleType::f32>
         : w.type == ScaleType::f16 ? row_fast<F, ScaleType::f16>
                                    : row_fast<F, ScaleType::bf16>)(w, prepared, n0, n1, out);
    return true;
  }
  return false;
}

template <class F, int M>
void rows_exact_block(const QuantMatrix& w, const void* const* prepared, int n0, int n1, float* const* out) {
  const Decoder<F> decode;
  const PreparedLayout layout = prepared_layout(w.k, false);
  const int per = w.group / kBlock;
  const int shift = per == 1 ? 0 : per == 2 ? 1 : 2;
  const int blocks = w.k / kBlock, groups = w.k / w.group;
  const bool biases_apart = !w.fp4 && w.bias_ratio == 0;
  const __m512i spread_groups = _mm512_srli_epi32(iota(), static_cast<unsigned>(shift));
  const __m512i spread_blocks = _mm512_srli_epi32(iota(), 2);
  const __m512 table = F::fp4 ? _mm512_setr_ps(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)
                              : _mm512_cvtepi32_ps(iota());
  for (int n = n0; n < n1; n++) {
    const uint8_t* codes = codes_row(w, n);
    const void* scales = scales_row(w, n);
    const void* biases = biases_row(w, n);
    __m512 total[M];
    for (int m = 0; m < M; m++) {
      total[m] = _mm512_setzero_ps();
    }
    for (int g = 0; g < groups; g += 16) {
      __m512 bias = load_biases(w, scales, biases, g, first16(groups - g));
      if (biases_apart) {
        ahead(biases, g, w.type);
      }
      for (int m = 0; m < M; m++) {
        total[m] = _mm512_fmadd_ps(bias, _mm512_loadu_ps(part(prepared[m], layout.sums) + g), total[m]);
      }
    }
    for (int b = 0; b < blocks; b += 16) {
      int here = blocks - b < 16 ? blocks - b : 16;
      __m512 scale = load_scales(scales, w.type, b >> shift, first16((here + per - 1) >> shift));
      scale = _mm512_permutexvar_ps(spread_groups, scale);
      ahead(scales, b >> shift, w.type);
      const uint8_t* p = codes + static_cast<int64_t>(b) * 4 * F::bits;
      int64_t at = static_cast<int64_t>(b) * kBlock;
      int left = here * 4 * F::bits;
      for (int j = 0; left > 0; j++, left -= kStepBytes<F>) {
        __mmask64 bytes = first64(left < kStepBytes<F> ? left : kStepBytes<F>);
        int64_t column = at + j * kStepCodes<F>;
        _mm_prefetch(reinterpret_cast<const char*>(p + j * kStepBytes<F> + kPrefetchBytes), _MM_HINT_T0);
        if constexpr (kNibbles<F>) {
          __m512i raw = _mm512_maskz_loadu_epi8(bytes, p + j * kStepBytes<F>);
          __m512 sum[M];
#pragma GCC unroll 8
          for (int i = 0; i < 8; i++) {
            __m512 value = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, static_cast<unsigned>(4 * i)), table);
            for (int m = 0; m < M; m++) {
              __m512 x = _mm512_loadu_ps(static_cast<const float*>(prepared[m]) + column + 16 * i);
              sum[m] = i == 0 ? _mm512_mul_ps(value, x) : _mm512_fmadd_ps(value, x, sum[m]);
            }
          }
          __m512 factor = _mm512_permutexvar_ps(_mm512_add_epi32(spread_blocks, _mm512_set1_epi32(4 * j)), scale);
          for (int m = 0; m < M; m++) {
            total[m] = _mm512_fmadd_ps(sum[m], factor, total[m]);
          }
        } else {
          alignas(64) uint8_t code[64];
          _mm512_store_si512(code, decode(p + j * kStepBytes<F>, bytes));
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) {
            __m512 value = _mm512_cvtepi32_ps(
                _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(code + 16 * i))));
            value = _mm512_mul_ps(value, _mm512_permutexvar_ps(_mm512_set1_epi32(2 * j + i / 2), scale));
            for (int m = 0; m < M; m++) {
              total[m] = _mm512_fmadd_ps(
                  value, _mm512_loadu_ps(static_cast<const float*>(prepared[m]) + column + 16 * i), total[m]);
            }
          }
        }
      }
    }
    for (int m = 0; m < M; m++) {
      out[m][n - n0] = _mm512_reduce_add_ps(total[m]);
    }
  }
}

void prepare_fast(const QuantMatrix& w, const float* x, void* prepared) {
  PreparedLayout layout = prepared_layout(w.k, true);
  auto* q = static_cast<int8_t*>(prepared);
  auto* scales = const_cast<float*>(part(prepared, layout.scales));
  auto* sums = const_cast<float*>(part(prepared, layout.sums));
  for (int64_t at = layout.sums; at < layout.bytes; at += 4) {
    *reinterpret_cast<float*>(static_cast<char*>(prepared) + at) = 0.0f;
  }
  int64_t columns = padded(w.k, kSuperBlock);
  const int lane = w.bits == 4 || w.bits == 8 ? 8 : 4; // codes of one lane of the kernel, which reads as many scales
  const __m512i pick = _mm512_slli_epi32(iota(), lane == 8 ? 3 : 2);
  for (int g = 0; g < w.k / w.group; g++) {
    __m512 total = _mm512_setzero_ps();
    for (int i = g * w.group; i < (g + 1) * w.group; i += 16) {
      __m512 scale;
      __m128i codes = quantize_eights(_mm512_loadu_ps(x + i), scale);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), codes);
      total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), scale, total);
      _mm512_mask_storeu_ps(scales + i / lane, first16(16 / lane), _mm512_permutexvar_ps(pick, scale));
    }
    sums[g] = _mm512_reduce_add_ps(total);
  }
  for (int64_t i = w.k; i < columns; i += 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm_setzero_si128());
    _mm512_mask_storeu_ps(scales + i / lane, first16(16 / lane), _mm512_setzero_ps());
  }
  if (w.bits == 4) {
    alignas(64) uint8_t even[64], odd[64];
    for (int i = 0; i < 64; i++) {
      even[i] = static_cast<uint8_t>(2 * i);
      odd[i] = static_cast<uint8_t>(2 * i + 1);
    }
    for (int64_t i = 0; i < columns; i += 128) {
      __m512i a = _mm512_loadu_si512(q + i), b = _mm512_loadu_si512(q + i + 64);
      _mm512_storeu_si512(q + i, _mm512_permutex2var_epi8(a, _mm512_load_si512(even), b));
      _mm512_storeu_si512(q + i + 64, _mm512_permutex2var_epi8(a, _mm512_load_si512(odd), b));
    }
  } else if (w.bits == 8) {
    const __m512i even = _mm512_slli_epi32(iota(), 1), odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    for (int64_t i = 0; i < columns; i += 128) {
      __m512i a = _mm512_loadu_si512(q + i), b = _mm512_loadu_si512(q + i + 64);
      _mm512_storeu_si512(q + i, _mm512_permutex2var_epi32(a, even, b));
      _mm512_storeu_si512(q + i + 64, _mm512_permutex2var_epi32(a, odd, b));
    }
  }
}

void prepare_exact(const QuantMatrix& w, const float* x, void* prepared) {
  PreparedLayout layout = prepared_layout(w.k, false);
  auto* values = static_cast<float*>(prepared);
  auto* sums = const_cast<float*>(part(prepared, layout.sums));
  for (int64_t at = layout.sums; at < layout.bytes; at += 4) {
    *reinterpret_cast<float*>(static_cast<char*>(prepared) + at) = 0.0f;
  }
  for (int g = 0; g < w.k / w.group; g++) {
    sums[g] = sum_group(x + static_cast<int64_t>(g) * w.group, w.group);
  }
  int64_t columns = padded(w.k, kSuperBlock);
  if (w.bits != 4) {
    for (int64_t i = 0; i < columns; i += 16) {
      _mm512_storeu_ps(values + i, i < w.k ? _mm512_loadu_ps(x + i) : _mm512_setzero_ps());
    }
    return;
  }
  const __m512i every8 = _mm512_slli_epi32(iota(), 3);
  for (int64_t i = 0; i < columns; i += 128) {
    __mmask16 lanes = first16(w.k - i > 0 ? (w.k - i) / 8 : 0);
    for (int j = 0; j < 8; j++) {
      _mm512_storeu_ps(values + i + 16 * j,
                       _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, every8, x + i + j, 4));
    }
  }
}

} // namespace
} // namespace edger1
