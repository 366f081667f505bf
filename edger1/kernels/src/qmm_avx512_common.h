// Decoding of packed codes and scales with AVX-512. Included by sources compiled for it only; everything is in an
// anonymous namespace, so that no copy of it can stand in for another instruction set's.
#pragma once

#include <immintrin.h>

#include "qmm_kernels.h"

namespace edger1 {
namespace {

template <int Bits, bool Fp4>
struct Format {
  static constexpr int bits = Bits;
  static constexpr bool fp4 = Fp4;
};

// Calls body(Format<...>{}) for the matrix's format.
template <class Body>
inline void for_format(const QuantMatrix& w, Body&& body) {
  switch (w.bits) {
    case 2:
      return body(Format<2, false>{});
    case 3:
      return body(Format<3, false>{});
    case 4:
      return w.fp4 ? body(Format<4, true>{}) : body(Format<4, false>{});
    case 5:
      return body(Format<5, false>{});
    case 6:
      return body(Format<6, false>{});
    default:
      return body(Format<8, false>{});
  }
}

inline __mmask16 first16(int64_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
}

inline __mmask64 first64(int64_t n) {
  return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
}

// T[code] = 2 * value + 12 of the 4-bit floats, in each 128-bit lane.
inline __m512i fp4_table() {
  return _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
}

// 64 codes of F::bits bits from 8 * F::bits bytes, in order, one a byte; mxfp4 codes come as T[code].
template <class F>
struct Decoder {
  __m512i spread, shifts;

  Decoder() {
    alignas(64) uint8_t from[64], by[64];
    for (int q = 0; q < 8; q++) {
      for (int i = 0; i < 8; i++) {
        from[8 * q + i] = static_cast<uint8_t>((F::bits * q + i) & 63);
        by[8 * q + i] = static_cast<uint8_t>(F::bits * i);
      }
    }
    spread = _mm512_load_si512(from);
    shifts = _mm512_load_si512(by);
  }

  __m512i operator()(const uint8_t* p, __mmask64 bytes) const {
    __m512i raw = _mm512_maskz_loadu_epi8(bytes, p);
    if constexpr (F::bits == 8) {
      return raw;
    }
    // Eight codes fill F::bits bytes: give each eight a quadword and pick its fields out.
    __m512i fields = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, raw));
    __m512i codes = _mm512_and_si512(fields, _mm512_set1_epi8((1 << F::bits) - 1));
    return F::fp4 ? _mm512_shuffle_epi8(fp4_table(), codes) : codes;
  }
};

// `count` <= 16 scales or biases as floats, the rest zero. For mxfp4 the half that belongs to T is in them.
inline __m512 load_scales(const void* base, ScaleType type, int64_t index, __mmask16 mask) {
  switch (type) {
    case ScaleType::f32:
      return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(base) + index);
    case ScaleType::f16:
      return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(base) + index));
    case ScaleType::bf16:
      return _mm512_castsi512_ps(_mm512_slli_epi32(
          _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(base) + index)), 16));
    case ScaleType::e8m0:
      break;
  }
  __m512i e = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(base) + index));
  __m512i value = _mm512_slli_epi32(e, 23);
  value = _mm512_mask_mov_epi32(value, _mm512_cmpeq_epi32_mask(e, _mm512_setzero_si512()), _mm512_set1_epi32(1 << 22));
  value = _mm512_mask_mov_epi32(value, _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(255)),
                                _mm512_set1_epi32(0x7fc00000));
  return _mm512_maskz_mul_ps(mask, _mm512_castsi512_ps(value), _mm512_set1_ps(0.5f));
}

// What multiplies a group's sum of activations.
inline __m512 load_biases(const QuantMatrix& w, const void* scales, const void* biases, int64_t index, __mmask16 mask) {
  if (w.fp4) {
    return _mm512_mul_ps(load_scales(scales, w.type, index, mask), _mm512_set1_ps(-12.0f));
  }
  if (w.bias_ratio != 0) {
    return _mm512_mul_ps(load_scales(scales, w.type, index, mask), _mm512_set1_ps(w.bias_ratio));
  }
  return load_scales(biases, w.type, index, mask);
}

inline const uint8_t* codes_row(const QuantMatrix& w, int64_t n) {
  return w.codes + n * w.row_bytes;
}

inline const void* scales_row(const QuantMatrix& w, int64_t n) {
  return static_cast<const char*>(w.scales) + n * w.scale_stride;
}

inline const void* biases_row(const QuantMatrix& w, int64_t n) {
  return w.fp4 ? nullptr : static_cast<const char*>(w.biases) + n * w.bias_stride;
}

inline __m512i iota() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// Quantizes 32 floats to int8: q = round(x / scale), scale = max |x| / 127. Returns the scale, `sum` of the q. What is not
// finite makes the scale NaN, so that it shows in the result.
inline float quantize_block(const float* x, __m256i& q, int& sum) {
  __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
  // |x| ordered as an integer: an infinity or a NaN is the largest.
  __m512i bits = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(a)), _mm512_castps_si512(_mm512_abs_ps(b)));
  float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(bits))));
  float inverse = amax > 0 ? 127.0f / amax : 0.0f;
  __m512i qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, _mm512_set1_ps(inverse)));
  __m512i qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, _mm512_set1_ps(inverse)));
  sum = _mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb));
  q = _mm256_set_m128i(_mm512_cvtsepi32_epi8(qb), _mm512_cvtsepi32_epi8(qa));
  return amax < __builtin_inff() ? amax / 127.0f : __builtin_nanf("");
}

// The same for each 8 of 16 floats: 16 int8, the two scales over 8 lanes each.
inline __m128i quantize_eights(__m512 x, __m512& scale) {
  __m512i bits = _mm512_castps_si512(_mm512_abs_ps(x));
  bits = _mm512_max_epi32(bits, _mm512_shuffle_i32x4(bits, bits, 0xb1));
  bits = _mm512_max_epi32(bits, _mm512_shuffle_epi32(bits, _MM_PERM_BADC));
  bits = _mm512_max_epi32(bits, _mm512_shuffle_epi32(bits, _MM_PERM_CDAB));
  __m512 largest = _mm512_castsi512_ps(bits);
  __m512 inverse = _mm512_maskz_div_ps(_mm512_test_epi32_mask(bits, bits), _mm512_set1_ps(127.0f), largest);
  scale = _mm512_mul_ps(largest, _mm512_set1_ps(1.0f / 127.0f));
  scale = _mm512_mask_mov_ps(scale, _mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(0x7f800000)),
                             _mm512_set1_ps(__builtin_nanf("")));
  return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)));
}

inline float sum_group(const float* x, int group) {
  __m512 total = _mm512_setzero_ps();
  for (int i = 0; i < group; i += 16) {
    total = _mm512_add_ps(total, _mm512_loadu_ps(x + i));
  }
  return _mm512_reduce_add_ps(total);
}

} // namespace
} // namespace edger1
