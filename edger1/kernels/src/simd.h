// Vectors of float of the width that the including source is compiled for, through the compiler's vector extensions.
//
// One body serves AVX-512, AVX2, NEON and plain SSE2: what differs is a handful of loads and conversions below. Everything
// is `static`: each instruction set's source keeps its own copies, because the linker may merge inline functions of
// the same name across sources and so leave AVX-512 code where an older processor reaches it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// GCC 12 sees uninitialised values in its own intrinsics' headers and impossible sizes in the unrolled tails.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wstringop-overflow"
#pragma GCC diagnostic ignored "-Wstringop-overread"
#pragma GCC diagnostic ignored "-Warray-bounds"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace edger1 {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));
typedef float vf_unaligned __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#define EDGER1_INLINE static inline __attribute__((always_inline))

EDGER1_INLINE vf splat(float x) {
  return x - vf{};
}
EDGER1_INLINE vi isplat(int32_t x) {
  return x - vi{};
}
EDGER1_INLINE vf as_float(vi x) {
  return (vf)x;
}
EDGER1_INLINE vi as_int(vf x) {
  return (vi)x;
}

EDGER1_INLINE vf load(const float* p) {
  return *reinterpret_cast<const vf_unaligned*>(p);
}
EDGER1_INLINE vf load(const bf16* p) {
  vh half = *reinterpret_cast<const vh_unaligned*>(p);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}
EDGER1_INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Shift exponent and mantissa into place, then let a multiplication by 2^112 correct the bias; subnormals come out
  // right, infinities and NaNs get the full exponent put back.
  vu half = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vu);
  vu sign = (half & 0x8000u) << 16;
  vu magnitude = (half & 0x7fffu) << 13;
  vf value = (vf)magnitude * splat(0x1p112f);
  vu special = (vu)((half & 0x7c00u) == 0x7c00u);
  return (vf)(((vu)value | (special & 0x7f800000u)) | sign);
#endif
}

EDGER1_INLINE void store(float* p, vf x) {
  *reinterpret_cast<vf_unaligned*>(p) = x;
}
EDGER1_INLINE void store(bf16* p, vf x) {
  vu bits = (vu)x;
  vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // NaN: keep it one, rounding could carry its mantissa away.
  vu nan = (vu)(x != x);
  rounded = (rounded & ~nan) | (((bits >> 16) | 0x40u) & nan);
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(rounded, vh);
}

// f16 with round to nearest even, by hand where the processor has no conversion.
EDGER1_INLINE uint16_t f16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) {
    return static_cast<uint16_t>(sign | 0x7c00u | (magnitude > 0x7f800000u ? 0x200u : 0u));
  }
  if (magnitude >= 0x477ff000u) {
    return static_cast<uint16_t>(sign | 0x7c00u);
  }
  if (magnitude < 0x38800000u) {
    // Adding 0.5 aligns the subnormal's last bit with the float's last bit, and the adder rounds.
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    std::memcpy(&magnitude, &shifted, 4);
    return static_cast<uint16_t>(sign | (magnitude - 0x3f000000u));
  }
  magnitude += 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u) >> 13));
}

EDGER1_INLINE void store(f16* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; i++) {
    p[i].bits = f16_bits(x[i]);
  }
#endif
}

// The first n < kWidth elements; the rest reads as zero.
template <class T>
EDGER1_INLINE vf load_n(const T* p, int n) {
  T buffer[kWidth] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <class T>
EDGER1_INLINE void store_n(T* p, vf x, int n) {
  T buffer[kWidth];
  store(buffer, x);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}
#if defined(__AVX512F__)
template <>
inline vf load_n<float>(const float* p, int n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
}
template <>
inline void store_n<float>(float* p, vf x, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), x);
}
#endif

// a * b + c in one rounding where the processor can (the build contracts nothing by itself).
EDGER1_INLINE vf mad(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

EDGER1_INLINE float hsum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float lane[kWidth];
  store(lane, x);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) {
      lane[i] += lane[i + half];
    }
  }
  return lane[0];
#endif
}
EDGER1_INLINE vf vmax(vf a, vf b) {
  return a > b ? a : b;
}
EDGER1_INLINE vf vmin(vf a, vf b) {
  return a < b ? a : b;
}
EDGER1_INLINE float hmax(vf x) {
  float lane[kWidth];
  store(lane, x);
  float best = lane[0];
  for (int i = 1; i < kWidth; i++) {
    best = lane[i] > best ? lane[i] : best;
  }
  return best;
}

// e^x to within 2 units in the last place; 0 below -87.3 (no subnormals), infinity above 88.7, NaN for NaN.
EDGER1_INLINE vf vexp(vf x) {
  const vf magic = splat(12582912.0f);
#if defined(__AVX512F__)
  // The second operand is the result where one is NaN.
  vf clamped = _mm512_min_ps(splat(88.8f), _mm512_max_ps(splat(-87.5f), x));
#else
  vf clamped = vmin(vmax(x, splat(-87.5f)), splat(88.8f));
#endif
  vf n = mad(clamped, splat(1.44269504088896341f), magic) - magic;
  vf r = mad(n, splat(-0.693359375f), clamped);
  r = mad(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = mad(p, r, splat(1.3981999507e-3f));
  p = mad(p, r, splat(8.3334519073e-3f));
  p = mad(p, r, splat(4.1665795894e-2f));
  p = mad(p, r, splat(1.6666665459e-1f));
  p = mad(p, r, splat(5.0000001201e-1f));
  p = mad(p, r * r, r) + splat(1.0f);
#if defined(__AVX512F__)
  // One instruction scales, and the smallest x give no subnormal.
  __mmask16 large = _mm512_cmp_ps_mask(x, splat(-87.33f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(large, p, n);
#else
  // Scale in two steps: 2^128 alone is no float.
  vi exponent = __builtin_convertvector(n, vi);
  vi half = exponent >> 1;
  vf low = as_float((half + 127) << 23);
  vf high = as_float((exponent - half + 127) << 23);
  vf y = p * low * high;
  y = x < splat(-87.33f) ? vf{} : y;
  y = x > splat(88.72283f) ? splat(__builtin_inff()) : y;
  return x != x ? x : y;
#endif
}

EDGER1_INLINE vf vsigmoid(vf x) {
  return splat(1.0f) / (splat(1.0f) + vexp(-x));
}

EDGER1_INLINE vf vtanh(vf x) {
  vf magnitude = x < vf{} ? -x : x;
  // 1 - 2/(e^2x + 1) loses digits near zero; an odd polynomial takes over there.
  vf x2 = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = mad(p, x2, splat(2.06390887954e-2f));
  p = mad(p, x2, splat(-5.37397155531e-2f));
  p = mad(p, x2, splat(1.33314422036e-1f));
  p = mad(p, x2, splat(-3.33332819422e-1f));
  vf small = mad(p * x2, x, x);
  vf large = splat(1.0f) - splat(2.0f) / (vexp(magnitude + magnitude) + splat(1.0f));
  large = x < vf{} ? -large : large;
  return magnitude < splat(0.625f) ? small : large;
}

// Rational approximation of erf on [-4, 4], outside which it is +-1 in float.
EDGER1_INLINE vf verf(vf x) {
  vf t = vmin(vmax(x, splat(-4.0f)), splat(4.0f));
  vf t2 = t * t;
  vf p = splat(-2.72614225801306e-10f);
  p = mad(p, t2, splat(2.77068142495902e-08f));
  p = mad(p, t2, splat(-2.10102402082508e-06f));
  p = mad(p, t2, splat(-5.69250639462346e-05f));
  p = mad(p, t2, splat(-7.34990630326855e-04f));
  p = mad(p, t2, splat(-2.95459980854025e-03f));
  p = mad(p, t2, splat(-1.60960333262415e-02f));
  p = p * t;
  vf q = splat(-1.45660718464996e-05f);
  q = mad(q, t2, splat(-2.13374055278905e-04f));
  q = mad(q, t2, splat(-1.68282697438203e-03f));
  q = mad(q, t2, splat(-7.37332916720468e-03f));
  q = mad(q, t2, splat(-1.42647390514189e-02f));
  return p / q;
}

} // namespace
} // namespace edger1
