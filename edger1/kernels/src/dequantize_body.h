// Reading quantized rows back, for one instruction set; see dequantize_ops.h.
#pragma once

#include "dequantize_ops.h"
#include "simd.h"

namespace edger1 {
namespace {

typedef uint8_t vb __attribute__((vector_size(kWidth)));
typedef uint8_t vb_unaligned __attribute__((vector_size(kWidth), aligned(1), may_alias));

EDGER1_INLINE float number_at(const void* p, Float type, int64_t i) {
  if (type == Float::f32) {
    return static_cast<const float*>(p)[i];
  }
  return type == Float::bf16 ? load_n(static_cast<const bf16*>(p) + i, 1)[0] : load_n(static_cast<const f16*>(p) + i, 1)[0];
}

// kWidth codes from number i on, i a multiple of kWidth; BITS divides 32.
template <int BITS>
EDGER1_INLINE vi codes_at(const uint8_t* codes, int64_t i) {
  if constexpr (BITS == 8) {
    return __builtin_convertvector(*reinterpret_cast<const vb_unaligned*>(codes + i), vi);
  } else {
    constexpr int per_word = 32 / BITS;
    vu words, shifts;
    uint32_t word[2];
    std::memcpy(word, codes + i / per_word * 4, kWidth > per_word ? 8 : 4);
    for (int j = 0; j < kWidth; j++) {
      words[j] = word[kWidth > per_word ? j / per_word : 0];
      shifts[j] = static_cast<uint32_t>(j % per_word * BITS);
    }
    shifts += static_cast<uint32_t>(i % per_word * BITS);
    return (vi)((words >> shifts) & ((1u << BITS) - 1u));
  }
}

template <int BITS>
static void affine_row(float* out, const QuantizedRow& row, int64_t n) {
  for (int64_t g = 0; g * row.group < n; g++) {
    vf scale = splat(number_at(row.scales, row.type, g)), bias = splat(number_at(row.biases, row.type, g));
    for (int64_t i = g * row.group; i < (g + 1) * row.group; i += kWidth) {
      store(out + i, __builtin_convertvector(codes_at<BITS>(row.codes, i), vf) * scale + bias);
    }
  }
}

// Codes that straddle bytes.
static void uneven_row(float* out, const QuantizedRow& row, int64_t n) {
  uint32_t mask = (1u << row.bits) - 1u;
  for (int64_t g = 0; g * row.group < n; g++) {
    float scale = number_at(row.scales, row.type, g), bias = number_at(row.biases, row.type, g);
    for (int64_t i = g * row.group; i < (g + 1) * row.group; i++) {
      int64_t bit = i * row.bits;
      uint32_t code = row.codes[bit / 8];
      if (bit % 8 + row.bits > 8) {
        code |= static_cast<uint32_t>(row.codes[bit / 8 + 1]) << 8;
      }
      out[i] = static_cast<float>((code >> (bit % 8)) & mask) * scale + bias;
    }
  }
}

static void mxfp4_row(float* out, const QuantizedRow& row, int64_t n) {
  constexpr float values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  const auto* exponents = static_cast<const uint8_t*>(row.scales);
  for (int64_t g = 0; g * row.group < n; g++) {
    // 2^(e - 127); the smallest is no normal float.
    uint32_t bits = exponents[g] ? static_cast<uint32_t>(exponents[g]) << 23 : 0x400000u;
    float scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    for (int64_t i = g * row.group; i < (g + 1) * row.group; i += 2) {
      uint8_t pair = row.codes[i / 2];
      out[i] = values[pair & 15] * scale;
      out[i + 1] = values[pair >> 4] * scale;
    }
  }
}

static void dequantize_row(float* out, const QuantizedRow& row, int64_t n) {
  if (row.mxfp4) {
    return mxfp4_row(out, row, n);
  }
  switch (row.bits) {
    case 2:
      return affine_row<2>(out, row, n);
    case 4:
      return affine_row<4>(out, row, n);
    case 8:
      return affine_row<8>(out, row, n);
    default:
      return uneven_row(out, row, n);
  }
}

} // namespace
} // namespace edger1
