// What the small path's fast loops on AVX2 for 4 and 8 bits share: 64 columns a step, and rows of x prepared for it.
//
// A step's products are added up as integers over the kScaled columns that share one activation scale, so that a lane of
// eight holds one such sum, and conversion, scaling and addition in f32 are done once for 64 columns. A row is prepared in
// the order that the lanes want, each step's 64 bytes with its 8 scales behind them:
//   4 bits   the even columns, then the odd ones, as the low and the high halves of the codes' bytes come;
//   8 bits   the first four columns of each eight, then the last four, the eights in the order kEights.
// Codes of 8 bits are taken as signed, code - 128, since sums of two unsigned products would not fit 16 bits; 128 scales
// more in the bias make up for it.
#pragma once

#include "qmm_avx2_body.h"

namespace edger1 {
namespace {

constexpr int kStep = 64;
constexpr int kStepBytes = kStep + kStep / kScaled * 4;
constexpr int kEights[8] = {0, 1, 4, 5, 2, 3, 6, 7};
constexpr int kMostAtOnce = 8;

inline bool in_steps(const QuantMatrix& w) {
  return w.bits == 4 || w.bits == 8;
}

// Eights [from, to) of a row, one after the other.
inline void prepare_eights(const QuantMatrix& w, const float* x, int from, int to, char* prepared, float* sums) {
  for (int i = from; i < to; i += kScaled) {
    int8_t q[kScaled];
    int sum;
    float scale = quantize<kScaled>(x + i, q, sum);
    sums[i / w.group] += scale * static_cast<float>(sum);
    char* step = prepared + i / kStep * kStepBytes;
    int eight = i % kStep / kScaled, lane = w.bits == 8 ? kEights[eight] : eight; // kEights is its own inverse
    for (int j = 0; j < kScaled; j++) {
      int half = w.bits == 8 ? j / 4 : j % 2, at = w.bits == 8 ? j % 4 : j / 2;
      step[32 * half + 4 * lane + at] = q[j];
    }
    __builtin_memcpy(step + kStep + 4 * lane, &scale, 4);
  }
}

inline __m256 pair_max(__m256 a, __m256 b) {
  return _mm256_max_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}

// The same for a whole step, all its eights side by side; false, and nothing done, where not all of it is finite.
inline bool prepare_step(const QuantMatrix& w, const float* x, char* step, float* products) {
  const __m256 sign = _mm256_set1_ps(-0.0f), infinity = _mm256_set1_ps(__builtin_inff());
  __m256 v[8], a[8], odd = _mm256_setzero_ps();
#pragma GCC unroll 8
  for (int g = 0; g < 8; g++) {
    v[g] = _mm256_loadu_ps(x + g * kScaled);
    a[g] = _mm256_andnot_ps(sign, v[g]);
    odd = _mm256_or_ps(odd, _mm256_cmp_ps(a[g], infinity, _CMP_NLT_UQ));
  }
  if (_mm256_movemask_ps(odd) != 0) {
    return false;
  }
  __m256 low = pair_max(pair_max(a[0], a[1]), pair_max(a[2], a[3]));
  __m256 high = pair_max(pair_max(a[4], a[5]), pair_max(a[6], a[7]));
  __m256 largest = _mm256_max_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  const __m256 most = _mm256_set1_ps(127.0f);
  __m256 inverse = _mm256_and_ps(_mm256_div_ps(most, largest), _mm256_cmp_ps(largest, _mm256_setzero_ps(), _CMP_GT_OQ));
  __m256 scale = _mm256_div_ps(largest, most);
  alignas(32) float factor[8];
  _mm256_store_ps(factor, inverse);
  __m256i q[8];
#pragma GCC unroll 8
  for (int g = 0; g < 8; g++) {
    q[g] = _mm256_cvtps_epi32(_mm256_mul_ps(v[g], _mm256_set1_ps(factor[g])));
  }
  __m256i sum_low = _mm256_hadd_epi32(_mm256_hadd_epi32(q[0], q[1]), _mm256_hadd_epi32(q[2], q[3]));
  __m256i sum_high = _mm256_hadd_epi32(_mm256_hadd_epi32(q[4], q[5]), _mm256_hadd_epi32(q[6], q[7]));
  __m256i sum = _mm256_add_epi32(_mm256_permute2x128_si256(sum_low, sum_high, 0x20),
                                 _mm256_permute2x128_si256(sum_low, sum_high, 0x31));
  _mm256_storeu_ps(products, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(sum)));
  // Bytes: the first four of the eights 0 to 3 and their last four; then those of 4 to 7.
  __m256i near = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  __m256i far = _mm256_packs_epi16(_mm256_packs_epi32(q[4], q[5]), _mm256_packs_epi32(q[6], q[7]));
  __m256i first, second;
  if (w.bits == 8) {
    __m256i outer = _mm256_unpacklo_epi64(near, far), inner = _mm256_unpackhi_epi64(near, far);
    first = _mm256_permute2x128_si256(outer, inner, 0x20);
    second = _mm256_permute2x128_si256(outer, inner, 0x31);
    scale = _mm256_permutevar8x32_ps(scale, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kEights)));
  } else {
    const __m256i even_first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
    __m256i fours = _mm256_shuffle_epi8(_mm256_permute2x128_si256(near, far, 0x20), even_first);
    __m256i others = _mm256_shuffle_epi8(_mm256_permute2x128_si256(near, far, 0x31), even_first);
    first = _mm256_blend_epi16(fours, _mm256_slli_epi32(others, 16), 0xaa);
    second = _mm256_blend_epi16(_mm256_srli_epi32(fours, 16), others, 0xaa);
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(step), first);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(step + 32), second);
  _mm256_storeu_ps(reinterpret_cast<float*>(step + kStep), scale);
  return true;
}

void prepare_steps(const QuantMatrix& w, const float* x, void* prepared) {
  if (!in_steps(w)) {
    return prepare_fast(w, x, prepared);
  }
  PreparedLayout layout = prepared_layout(w.k, true);
  auto* to = static_cast<char*>(prepared);
  auto* sums = const_cast<float*>(part(prepared, layout.sums));
  const int whole = w.k / kStep * kStep;
  __builtin_memset(sums, 0, static_cast<size_t>(layout.bytes - layout.sums));
  for (int i = 0; i < whole; i += kStep) {
    alignas(32) float products[8];
    if (!prepare_step(w, x + i, to + i / kStep * kStepBytes, products)) {
      prepare_eights(w, x, i, i + kStep, to, sums);
      continue;
    }
    for (int g = 0; g < 8; g++) {
      sums[(i + g * kScaled) >> __builtin_ctz(static_cast<unsigned>(w.group))] += products[g];
    }
  }
  if (whole < w.k) {
    __builtin_memset(to + whole / kStep * kStepBytes, 0, kStepBytes);
    prepare_eights(w, x, whole, w.k, to, sums);
  }
}

struct StepCodes {
  __m256i first, second;               // unsigned
  __m256i first_sign, second_sign;     // 8 bits: the codes as signed numbers, whose absolute values those are
};

// The codes of 64 columns, or of the row's last 32, those behind them as zero.
template <class F>
inline StepCodes step_codes(const uint8_t* p, bool whole) {
  StepCodes codes;
  if constexpr (F::bits == 8) {
    const __m256i middle = _mm256_set1_epi8(-128);
    __m256i a = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), middle), b{};
    if (whole) {
      b = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32)), middle);
    }
    __m256 fa = _mm256_castsi256_ps(a), fb = _mm256_castsi256_ps(b);
    codes.first_sign = _mm256_castps_si256(_mm256_shuffle_ps(fa, fb, 0x88));
    codes.second_sign = _mm256_castps_si256(_mm256_shuffle_ps(fa, fb, 0xdd));
    codes.first = _mm256_abs_epi8(codes.first_sign);
    codes.second = _mm256_abs_epi8(codes.second_sign);
  } else {
    __m256i raw = whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                        : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i low = _mm256_set1_epi8(15);
    codes.first = _mm256_and_si256(raw, low);
    codes.second = _mm256_and_si256(_mm256_srli_epi16(raw, 4), low);
    if constexpr (F::fp4) {
      __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kFp4Table)));
      codes.first = _mm256_shuffle_epi8(table, codes.first);
      codes.second = _mm256_shuffle_epi8(table, codes.second);
    }
  }
  return codes;
}

// Sums of the products over each eight columns.
template <class F>
inline f8 step_dot(const StepCodes& codes, const char* x) {
  __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32));
  if constexpr (F::bits == 8) {
    first = _mm256_sign_epi8(first, codes.first_sign);
    second = _mm256_sign_epi8(second, codes.second_sign);
  }
#if defined(__AVXVNNI__)
  __m256i sum = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), codes.first, first);
  sum = _mm256_dpbusd_avx_epi32(sum, codes.second, second);
#else
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i a = _mm256_maddubs_epi16(codes.first, first), b = _mm256_maddubs_epi16(codes.second, second), sum;
  if constexpr (F::bits == 8) {
    sum = _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
  } else {
    static_assert(4 * F::largest * 127 <= 32767);
    sum = _mm256_madd_epi16(_mm256_add_epi16(a, b), ones);
  }
#endif
  __m256 result = _mm256_cvtepi32_ps(sum);
  f8 v;
  __builtin_memcpy(&v, &result, 32);
  return v;
}

// A step's scales of w in its lanes: one for all, or in groups of 32 one for each half of the columns.
template <class F, bool Halves>
inline f8 lane_scales(const float* scales) {
  if constexpr (!Halves) {
    return set8(scales[0]);
  } else {
    __m128 first = _mm_set1_ps(scales[0]), second = _mm_set1_ps(scales[1]);
    if constexpr (F::bits == 8) {
      first = second = _mm_shuffle_ps(first, second, 0);
    }
    f8 v;
    __m256 both = _mm256_setr_m128(first, second);
    __builtin_memcpy(&v, &both, 32);
    return v;
  }
}

inline __m128 halves(f8 total) {
  __m256 v;
  __builtin_memcpy(&v, &total, 32);
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}

} // namespace
} // namespace edger1
