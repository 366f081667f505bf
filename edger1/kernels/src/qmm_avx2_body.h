// What the vector loops of qmm_generic.h need from AVX2, with or without its own integer dot product (AVX-VNNI).
#pragma once

#include <immintrin.h>

#include "qmm_vector.h"

namespace edger1 {
namespace {

inline f8 fma8(f8 a, f8 b, f8 c) {
  return _mm256_fmadd_ps(a, b, c);
}

inline f8 expand8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline void convert(const void* from, ScaleType type, int64_t count, float* to) {
  int64_t i = 0;
  if (type == ScaleType::f16 || type == ScaleType::bf16) {
    const auto* half = static_cast<const uint16_t*>(from);
    for (; i + 8 <= count; i += 8) {
      __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i));
      _mm256_storeu_ps(to + i, type == ScaleType::f16
                                   ? _mm256_cvtph_ps(raw)
                                   : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16)));
    }
  }
  int64_t size = type == ScaleType::f32 ? 4 : type == ScaleType::e8m0 ? 1 : 2;
  convert_any(static_cast<const char*>(from) + i * size, type, count - i, to + i);
}

// How the 32 codes of Bits bits each in 4 * Bits bytes come to their places. Each 128-bit lane makes 16 codes of
// 2 * Bits bytes; a code's 16-bit window is the byte that it begins in and the one behind, which it may reach into.
template <int Bits>
struct Unpacking {
  // What the second lane loads ends where the block does, so that nothing behind the block is read.
  static constexpr int second = Bits > 4 ? 4 * Bits - 16 : 0;
  alignas(32) uint8_t even[32], odd[32]; // bytes of the windows
  alignas(32) uint16_t up_even[16], up_odd[16]; // factors that shift a window to the left

  constexpr Unpacking() : even{}, odd{}, up_even{}, up_odd{} {
    for (int i = 0; i < 32; i++) {
      int bit = Bits * (i % 16), from = bit / 8 + (i < 16 ? 0 : 2 * Bits - second);
      int inside = bit % 8, at = i / 2;
      auto* window = (i % 2 == 0 ? even : odd) + 2 * at;
      window[0] = static_cast<uint8_t>(from);
      window[1] = static_cast<uint8_t>(inside + Bits > 8 ? from + 1 : 0x80);
      if (i % 2 == 0) {
        up_even[at] = static_cast<uint16_t>(1 << (16 - Bits - inside)); // to the top
      } else {
        up_odd[at] = static_cast<uint16_t>(1 << (8 - inside)); // to the upper byte
      }
    }
  }
};

template <int Bits>
constexpr Unpacking<Bits> kUnpacking{};

inline __m256i load_table(const void* p) {
  return _mm256_load_si256(static_cast<const __m256i*>(p));
}

// 2, 3, 5 or 6 bits. There is no shift of 16-bit lanes by an amount each: products with powers of two stand for it.
template <int Bits>
inline __m256i unpack_uneven(const uint8_t* p) {
  constexpr const Unpacking<Bits>& how = kUnpacking<Bits>;
  __m256i raw;
  if constexpr (Bits < 4) {
    __m128i all = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    if constexpr (Bits == 3) {
      int32_t rest;
      __builtin_memcpy(&rest, p + 8, 4);
      all = _mm_insert_epi32(all, rest, 2);
    }
    raw = _mm256_broadcastsi128_si256(all);
  } else {
    raw = _mm256_set_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + how.second)),
                           _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  __m256i even = _mm256_mullo_epi16(_mm256_shuffle_epi8(raw, load_table(how.even)), load_table(how.up_even));
  __m256i odd = _mm256_mullo_epi16(_mm256_shuffle_epi8(raw, load_table(how.odd)), load_table(how.up_odd));
  odd = _mm256_and_si256(odd, _mm256_set1_epi16(((1 << Bits) - 1) << 8));
  return _mm256_or_si256(_mm256_srli_epi16(even, 16 - Bits), odd);
}

template <class F>
inline b32 decode32(const uint8_t* p) {
  __m256i codes;
  if constexpr (F::bits == 8) {
    codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  } else if constexpr (F::bits == 4) {
    __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
    __m128i even = _mm_and_si128(raw, low), odd = _mm_and_si128(_mm_srli_epi16(raw, 4), low);
    codes = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    if constexpr (F::fp4) {
      codes = _mm256_shuffle_epi8(
          _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kFp4Table))), codes);
    }
  } else {
    codes = unpack_uneven<F::bits>(p);
  }
  b32 v;
  __builtin_memcpy(&v, &codes, 32);
  return v;
}

#if defined(__AVXVNNI__)

template <class F>
inline i8 dot32(b32 block, const int8_t* x) {
  __m256i codes;
  __builtin_memcpy(&codes, &block, 32);
  __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  __m256i sum = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), codes, v);
  i8 result;
  __builtin_memcpy(&result, &sum, 32);
  return result;
}

// Sums over a block's 8 steps of 4 products, for 4 rows and 16 columns: panel steps are 128 bytes apart, x's 16.
template <class F>
inline void block_dot(const uint8_t* panel, const int8_t* x, i8 (*sum)[2]) {
  __m256i total[4][2];
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) {
    __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + j * 128));
    __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + j * 128 + 32));
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) {
      int32_t word;
      __builtin_memcpy(&word, x + j * 16 + m * 4, 4);
      __m256i v = _mm256_set1_epi32(word);
      total[m][0] = _mm256_dpbusd_avx_epi32(j == 0 ? _mm256_setzero_si256() : total[m][0], w0, v);
      total[m][1] = _mm256_dpbusd_avx_epi32(j == 0 ? _mm256_setzero_si256() : total[m][1], w1, v);
    }
  }
  __builtin_memcpy(sum, total, sizeof total);
}

#else

// Products of unsigned and signed bytes are added in pairs with saturation at 32,767: 8-bit codes go as two nibbles.
template <class F>
inline i8 dot32(b32 block, const int8_t* x) {
  __m256i codes, ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
  __builtin_memcpy(&codes, &block, 32);
  __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), sum;
  if constexpr (F::bits == 8) {
    __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
    sum = _mm256_add_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(codes, low), v), ones),
                           _mm256_madd_epi16(_mm256_maddubs_epi16(high, v), _mm256_set1_epi16(16)));
  } else {
    sum = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, v), ones);
  }
  i8 result;
  __builtin_memcpy(&result, &sum, 32);
  return result;
}

// One of the nibbles of the codes (Half 0 or 1), or the codes themselves (Half -1), over a block's 8 steps.
template <int Largest, int Half>
inline void block_pass(const uint8_t* panel, const int8_t* x, __m256i (*sum)[2]) {
  constexpr int depth = 32767 / (Largest * 254) < 8 ? 32767 / (Largest * 254) >= 4 ? 4 : 2 : 8;
  const __m256i ones = _mm256_set1_epi16(Half == 1 ? 16 : 1), low = _mm256_set1_epi8(15);
  for (int j0 = 0; j0 < 8; j0 += depth) {
    __m256i part[4][2];
#pragma GCC unroll 8
    for (int j = 0; j < depth; j++) {
      __m256i w[2];
      for (int half = 0; half < 2; half++) {
        w[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + (j0 + j) * 128 + 32 * half));
        if constexpr (Half == 0) {
          w[half] = _mm256_and_si256(w[half], low);
        } else if constexpr (Half == 1) {
          w[half] = _mm256_and_si256(_mm256_srli_epi16(w[half], 4), low);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < 4; m++) {
        int32_t word;
        __builtin_memcpy(&word, x + (j0 + j) * 16 + m * 4, 4);
        __m256i v = _mm256_set1_epi32(word);
        for (int half = 0; half < 2; half++) {
          __m256i product = _mm256_maddubs_epi16(w[half], v);
          part[m][half] = j == 0 ? product : _mm256_add_epi16(part[m][half], product);
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) {
      for (int half = 0; half < 2; half++) {
        __m256i wide = _mm256_madd_epi16(part[m][half], ones);
        sum[m][half] = j0 == 0 && Half != 1 ? wide : _mm256_add_epi32(sum[m][half], wide);
      }
    }
  }
}

// Sums over a block's 8 steps of 4 products, for 4 rows and 16 columns: panel steps are 128 bytes apart, x's 16.
template <class F>
inline void block_dot(const uint8_t* panel, const int8_t* x, i8 (*sum)[2]) {
  __m256i total[4][2];
  if constexpr (F::bits == 8) {
    block_pass<15, 0>(panel, x, total);
    block_pass<15, 1>(panel, x, total);
  } else {
    block_pass<F::largest, -1>(panel, x, total);
  }
  __builtin_memcpy(sum, total, sizeof total);
}

#endif

} // namespace
} // namespace edger1

#include "qmm_generic.h"
