// The small path's fast loops on AVX2 for 4 and 8 bits: 64 columns a step, up to eight rows of x a pass.
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

// Reads up to 8 scales or biases as floats, zeros behind them and nothing that is not theirs.
struct ReadHalves {
  __m128i pairs, place;
  int last; // index of one that has no other to its pair, or -1

  explicit ReadHalves(int count) {
    alignas(16) static constexpr int kPairs[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
    alignas(16) static constexpr int8_t kPlaces[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1,
                                                       -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kPairs + 4 - count / 2));
    place = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kPlaces + 16 - 2 * count));
    last = count % 2 != 0 ? count - 1 : -1;
  }
  __m128i raw(const char* from) const {
    __m128i found = _mm_maskload_epi32(reinterpret_cast<const int*>(from), pairs);
    if (last >= 0) {
      int one = reinterpret_cast<const uint16_t*>(from)[last];
      found = _mm_or_si128(found, _mm_shuffle_epi8(_mm_cvtsi32_si128(one), place));
    }
    return found;
  }
};

struct ReadF16 : ReadHalves {
  using ReadHalves::ReadHalves;
  __m256 operator()(const char* from) const {
    return _mm256_cvtph_ps(raw(from));
  }
};

struct ReadBf16 : ReadHalves {
  using ReadHalves::ReadHalves;
  __m256 operator()(const char* from) const {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw(from)), 16));
  }
};

struct ReadF32 {
  __m256i mask;

  explicit ReadF32(int count) {
    alignas(32) static constexpr int kFirst[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    mask = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirst + 8 - count));
  }
  __m256 operator()(const char* from) const {
    return _mm256_maskload_ps(reinterpret_cast<const float*>(from), mask);
  }
};

struct ReadE8m0 {
  int count;

  explicit ReadE8m0(int count_) : count(count_) {}
  __m256 operator()(const char* from) const {
    if (count < 8) {
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

// The scales and biases of up to eight groups, from group g on, of the rows [n, n + R).
template <class F, int R>
inline void step_scales(const QuantMatrix& w, int64_t n, int g, int count, __m256 (&scale)[R], __m256 (&bias)[R]) {
  count = count < 8 ? count : 8;
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
    all(ReadF32(count), 4);
  } else if (w.type == ScaleType::f16) {
    all(ReadF16(count), 2);
  } else if (w.type == ScaleType::bf16) {
    all(ReadBf16(count), 2);
  } else {
    all(ReadE8m0(count), 1);
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

// out[m][at + r] = the sum of total[r][m]; the last additions of four are done side by side.
template <int M, int R>
[[gnu::always_inline]] inline void store_sums(const f8 (&total)[R][M], int at, float* const* out) {
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

constexpr int kStepGroups = 256; // groups whose scales are on the stack at a time

// Rows [n, n + R) of w with M rows of x. A short row's sums wait for each other most of the time: R rows go side by side.
template <class F, int M, int R, bool Halves>
inline void steps_rows(const QuantMatrix& w, const char* const (&x)[M], int64_t sums, int64_t n, int at, float* const* out) {
  const int groups = w.k / w.group, whole = w.k / kStep;
  const int shift = w.group > kStep ? 1 : 0; // groups have 32, 64 or 128 columns
  const bool biased = F::bits != 8 || w.bias_ratio != -128.0f;
  alignas(32) float scales[R][kStepGroups + 8];
  const uint8_t* codes = w.codes + n * w.row_bytes;
  f8 total[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      total[r][m] = f8{};
    }
  }
  for (int g0 = 0; g0 < groups; g0 += kStepGroups) {
    int here = groups - g0 < kStepGroups ? groups - g0 : kStepGroups;
    for (int g = 0; g < here; g += 8) {
      __m256 scale[R], bias[R];
      step_scales<F, R>(w, n, g0 + g, here - g, scale, bias);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        _mm256_store_ps(scales[r] + g, scale[r]);
#pragma GCC unroll 8
        for (int m = 0; biased && m < M; m++) {
          f8 offset;
          __builtin_memcpy(&offset, &bias[r], 32);
          total[r][m] = fma8(offset, load8(part(x[m], sums) + g0 + g), total[r][m]);
        }
      }
    }
    const int first = static_cast<int>(int64_t{g0} * w.group / kStep), last = (g0 + here) * w.group / kStep;
    auto step = [&](int s, bool is_whole) {
      int64_t from = static_cast<int64_t>(s) * kStep * F::bits / 8, of_x = static_cast<int64_t>(s) * kStepBytes;
      int group = (Halves ? 2 * s : s >> shift) - g0;
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        StepCodes code = step_codes<F>(codes + r * w.row_bytes + from, is_whole);
        f8 scale = lane_scales<F, Halves>(scales[r] + group);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          f8 factor = scale * load8(reinterpret_cast<const float*>(x[m] + of_x + kStep));
          total[r][m] = fma8(step_dot<F>(code, x[m] + of_x), factor, total[r][m]);
        }
      }
    };
    for (int s = first; s < last; s++) {
      step(s, true);
    }
    if (Halves && g0 + here == groups && w.k % kStep != 0) {
      step(whole, false);
    }
  }
  store_sums<M, R>(total, at, out);
}

template <class F, int M, bool Halves>
void steps_block(const QuantMatrix& w, const void* const* prepared, int n0, int n1, float* const* out) {
  constexpr int R = M <= 2 ? 4 : M <= 4 ? 2 : 1;
  const int64_t sums = prepared_layout(w.k, true).sums;
  const char* x[M];
  for (int m = 0; m < M; m++) {
    x[m] = static_cast<const char*>(prepared[m]);
  }
  int n = n0;
  for (; n + R <= n1; n += R) {
    steps_rows<F, M, R, Halves>(w, x, sums, n, n - n0, out);
  }
  if constexpr (R > 1) {
    for (; n < n1; n++) {
      steps_rows<F, M, 1, Halves>(w, x, sums, n, n - n0, out);
    }
  }
}

template <class F, int M>
void steps_of(const QuantMatrix& w, const void* const* prepared, int n0, int n1, float* const* out) {
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
