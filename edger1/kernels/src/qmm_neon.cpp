#include "qmm_tables.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

#include "qmm_vector.h"

namespace edger1 {
namespace {

struct Pair {
  int32x4_t first, second;
};

inline f8 fma8(f8 a, f8 b, f8 c) {
  float32x4_t x[2], y[2], z[2];
  __builtin_memcpy(x, &a, 32);
  __builtin_memcpy(y, &b, 32);
  __builtin_memcpy(z, &c, 32);
  z[0] = vfmaq_f32(z[0], x[0], y[0]);
  z[1] = vfmaq_f32(z[1], x[1], y[1]);
  __builtin_memcpy(&c, z, 32);
  return c;
}

inline f8 expand8(const uint8_t* p) {
  uint16x8_t wide = vmovl_u8(vld1_u8(p));
  float32x4_t v[2] = {vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(wide)))};
  f8 result;
  __builtin_memcpy(&result, v, 32);
  return result;
}

inline void convert(const void* from, ScaleType type, int64_t count, float* to) {
  int64_t i = 0;
  if (type == ScaleType::f16) {
    const auto* half = static_cast<const uint16_t*>(from);
    for (; i + 4 <= count; i += 4) {
      vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half + i))));
    }
  }
  int64_t size = type == ScaleType::f32 ? 4 : type == ScaleType::e8m0 ? 1 : 2;
  convert_any(static_cast<const char*>(from) + i * size, type, count - i, to + i);
}

template <class F>
inline b32 decode32(const uint8_t* p) {
  if constexpr (F::bits == 4) {
    uint8x16_t raw = vld1q_u8(p), even = vandq_u8(raw, vdupq_n_u8(15)), odd = vshrq_n_u8(raw, 4);
    uint8x16_t codes[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
    if constexpr (F::fp4) {
      codes[0] = vqtbl1q_u8(vld1q_u8(kFp4Table), codes[0]);
      codes[1] = vqtbl1q_u8(vld1q_u8(kFp4Table), codes[1]);
    }
    b32 v;
    __builtin_memcpy(&v, codes, 32);
    return v;
  } else {
    return decode32_any<F>(p);
  }
}

// The dot product takes signed bytes on both sides: 8-bit codes go as two nibbles.
template <class F>
inline i8 dot32(b32 block, const int8_t* x) {
  uint8x16_t codes[2];
  __builtin_memcpy(codes, &block, 32);
  int32x4_t sum[2];
  for (int i = 0; i < 2; i++) {
    int8x16_t v = vld1q_s8(x + 16 * i);
    if constexpr (F::bits == 8) {
      int32x4_t low = vdotq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(vandq_u8(codes[i], vdupq_n_u8(15))), v);
      int32x4_t high = vdotq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(vshrq_n_u8(codes[i], 4)), v);
      sum[i] = vaddq_s32(low, vshlq_n_s32(high, 4));
    } else {
      sum[i] = vdotq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(codes[i]), v);
    }
  }
  i8 result;
  __builtin_memcpy(&result, sum, 32);
  return result;
}

// Sums over a block's 8 steps of 4 products, for 4 rows and 16 columns: panel steps are 128 bytes apart, x's 16.
template <class F>
inline void block_dot(const uint8_t* panel, const int8_t* x, i8 (*sum)[2]) {
  int32x4_t total[4][4], high[4][4];
  for (auto& row : total) {
    for (auto& one : row) {
      one = vdupq_n_s32(0);
    }
  }
  __builtin_memcpy(high, total, sizeof high);
  for (int j = 0; j < 8; j++) {
    int8x16_t rows = vld1q_s8(x + j * 16);
    for (int c = 0; c < 4; c++) {
      uint8x16_t code = vld1q_u8(panel + j * 128 + 16 * c);
      int8x16_t w = vreinterpretq_s8_u8(F::bits == 8 ? vandq_u8(code, vdupq_n_u8(15)) : code);
      total[0][c] = vdotq_laneq_s32(total[0][c], w, rows, 0);
      total[1][c] = vdotq_laneq_s32(total[1][c], w, rows, 1);
      total[2][c] = vdotq_laneq_s32(total[2][c], w, rows, 2);
      total[3][c] = vdotq_laneq_s32(total[3][c], w, rows, 3);
      if constexpr (F::bits == 8) {
        int8x16_t top = vreinterpretq_s8_u8(vshrq_n_u8(code, 4));
        high[0][c] = vdotq_laneq_s32(high[0][c], top, rows, 0);
        high[1][c] = vdotq_laneq_s32(high[1][c], top, rows, 1);
        high[2][c] = vdotq_laneq_s32(high[2][c], top, rows, 2);
        high[3][c] = vdotq_laneq_s32(high[3][c], top, rows, 3);
      }
    }
  }
  if constexpr (F::bits == 8) {
    for (int m = 0; m < 4; m++) {
      for (int c = 0; c < 4; c++) {
        total[m][c] = vaddq_s32(total[m][c], vshlq_n_s32(high[m][c], 4));
      }
    }
  }
  __builtin_memcpy(sum, total, sizeof total);
}

} // namespace
} // namespace edger1

#include "qmm_generic.h"

namespace edger1 {
const QmmKernels* const qmm_neon = &table;
} // namespace edger1
#else
namespace edger1 {
const QmmKernels* const qmm_neon = nullptr;
} // namespace edger1
#endif
