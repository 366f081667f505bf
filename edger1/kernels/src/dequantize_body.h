// Reading quantized rows back, for one instruction set; see dequantize_ops.h.
#pragma once

#include "dequantize_ops.h"
#include "few_bytes.h"
#include "simd.h"

namespace edger1 {
namespace {

typedef uint8_t vb_unaligned __attribute__((vector_size(kWidth), aligned(1), may_alias));

EDGER1_INLINE float number_at(const void* p, Float type, int64_t i) {
  if (type == Float::f32) {
    return static_cast<const float*>(p)[i];
  }
  uint16_t half = static_cast<const uint16_t*>(p)[i];
  if (type == Float::bf16) {
    uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  return load_n(static_cast<const f16*>(p) + i, 1)[0];
#endif
}

EDGER1_INLINE vi bytes_at(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const vb_unaligned*>(p), vi);
#endif
}

// codes_at for codes that straddle words: eight of them fill BITS bytes, and four fit into 32 bits.
template <int BITS>
EDGER1_INLINE vi uneven_codes_at(const uint8_t* codes, int64_t i) {
  vu words, shifts;
  for (int j = 0; j < kWidth; j += 4) {
    uint64_t eight = load_bytes<BITS>(codes + (i + j) / 8 * BITS);
    auto four = static_cast<uint32_t>(eight >> ((i + j) % 8 * BITS));
    for (int l = 0; l < 4; l++) {
      words[j + l] = four;
      shifts[j + l] = static_cast<uint32_t>(l * BITS);
    }
  }
  return (vi)((words >> shifts) & ((1u << BITS) - 1u));
}

// kWidth codes from number i on, i a multiple of kWidth.
template <int BITS>
EDGER1_INLINE vi codes_at(const uint8_t* codes, int64_t i) {
  if constexpr (BITS == 8) {
    return bytes_at(codes + i);
  } else if constexpr (32 % BITS != 0) {
    return uneven_codes_at<BITS>(codes, i);
  } else {
    constexpr int per_word = 32 / BITS;
    vu shifts;
    for (int j = 0; j < kWidth; j++) {
      shifts[j] = static_cast<uint32_t>(j % per_word * BITS);
    }
    uint32_t first;
    std::memcpy(&first, codes + i / per_word * 4, 4);
    vu words = (vu)isplat(static_cast<int32_t>(first));
    if constexpr (kWidth > per_word) {
      uint32_t second;
      std::memcpy(&second, codes + i / per_word * 4 + 4, 4);
      vi upper;
      for (int j = 0; j < kWidth; j++) {
        upper[j] = j < per_word ? 0 : -1;
      }
      words = upper ? (vu)isplat(static_cast<int32_t>(second)) : words;
    }
    if constexpr (kWidth < per_word) {
      shifts += static_cast<uint32_t>(i % per_word * BITS);
    }
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
    case 3:
      return affine_row<3>(out, row, n);
    case 5:
      return affine_row<5>(out, row, n);
    case 6:
      return affine_row<6>(out, row, n);
    default:
      return affine_row<8>(out, row, n);
  }
}

// 32 columns of one group for M rows of x: scales go to their side, and what biases add is the same for all columns.
template <int BITS, int M>
EDGER1_INLINE void back_strip(float* const* out, const float* x, int rows, const QuantizedRow& first, int64_t code_bytes,
                              int64_t scale_bytes, int64_t at) {
  constexpr int vectors = 32 / kWidth;
  int64_t group = at / first.group;
  vf sums[M][vectors];
  float shared[M] = {};
  for (auto& row : sums) {
    for (vf& sum : row) {
      sum = vf{};
    }
  }
  const uint8_t* codes = first.codes;
  const char *scales = static_cast<const char*>(first.scales), *biases = static_cast<const char*>(first.biases);
  for (int i = 0; i < rows; i++) {
    float scale = number_at(scales, first.type, group), bias = number_at(biases, first.type, group);
    vf factors[M];
    for (int r = 0; r < M; r++) {
      factors[r] = splat(x[r * rows + i] * scale);
      shared[r] += x[r * rows + i] * bias;
    }
    for (int v = 0; v < vectors; v++) {
      vf values = __builtin_convertvector(codes_at<BITS>(codes, at + v * kWidth), vf);
      for (int r = 0; r < M; r++) {
        sums[r][v] = mad(factors[r], values, sums[r][v]);
      }
    }
    codes += code_bytes;
    scales += scale_bytes;
    biases += scale_bytes;
  }
  for (int r = 0; r < M; r++) {
    for (int v = 0; v < vectors; v++) {
      store(out[r] + at + v * kWidth, sums[r][v] + splat(shared[r]));
    }
  }
}

template <int BITS>
static void back_of(float* const* out, const float* x, int m, int rows, const QuantizedRow& first, int64_t code_bytes,
                    int64_t scale_bytes, int64_t n) {
  for (int64_t at = 0; at < n; at += 32) {
    int r = 0;
    for (; r + 2 <= m; r += 2) {
      back_strip<BITS, 2>(out + r, x + int64_t{r} * rows, rows, first, code_bytes, scale_bytes, at);
    }
    if (r < m) {
      back_strip<BITS, 1>(out + r, x + int64_t{r} * rows, rows, first, code_bytes, scale_bytes, at);
    }
  }
}

static void back(float* const* out, const float* x, int m, int rows, const QuantizedRow& first, int64_t code_bytes,
                 int64_t scale_bytes, int64_t n) {
  auto run = first.bits == 2 ? back_of<2> : first.bits == 4 ? back_of<4> : back_of<8>;
  run(out, x, m, rows, first, code_bytes, scale_bytes, n);
}

} // namespace
} // namespace edger1
