#include <algorithm>
#include <cmath>
#include <cstring>

#include "latent_plan.h"

namespace edger1 {
namespace {

float element(const void* p, ScaleType type, int64_t i) {
  float value = 0;
  switch (type) {
    case ScaleType::f32:
      return static_cast<const float*>(p)[i];
    case ScaleType::f16:
      ops().to_f32(&value, static_cast<const uint16_t*>(p) + i, Float::f16, 1);
      return value;
    case ScaleType::bf16:
      ops().to_f32(&value, static_cast<const uint16_t*>(p) + i, Float::bf16, 1);
      return value;
    case ScaleType::e8m0:
      return std::ldexp(1.0f, static_cast<const uint8_t*>(p)[i] - 127);
  }
  return value;
}

// Code `i` of a row: `bits` bits, little-endian without gaps, the row's last bytes being its end.
uint32_t code_at(const uint8_t* row, int64_t row_bytes, int i, int bits) {
  int64_t bit = int64_t{i} * bits, byte = bit / 8;
  uint32_t word = row[byte];
  if (byte + 1 < row_bytes) {
    word |= static_cast<uint32_t>(row[byte + 1]) << 8;
  }
  return (word >> (bit % 8)) & ((1u << bits) - 1);
}

// E2M1: a sign, two bits of exponent, one of mantissa.
constexpr float kFp4[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

void widen_group(const QuantMatrix& w, const uint8_t* row, int first, float scale, float bias, float* to) {
  if (w.bits == 8) {
    for (int i = 0; i < w.group; i++) {
      to[i] = scale * static_cast<float>(row[first + i]) + bias;
    }
  } else if (w.bits == 4) {
    const uint8_t* codes = row + first / 2;
    for (int i = 0; i < w.group; i += 2) {
      uint8_t two = codes[i / 2];
      to[i] = w.fp4 ? scale * kFp4[two & 15] : scale * static_cast<float>(two & 15) + bias;
      to[i + 1] = w.fp4 ? scale * kFp4[two >> 4] : scale * static_cast<float>(two >> 4) + bias;
    }
  } else {
    for (int i = 0; i < w.group; i++) {
      to[i] = scale * static_cast<float>(code_at(row, w.row_bytes, first + i, w.bits)) + bias;
    }
  }
}

} // namespace

void widen(const Projection& p, float* out) {
  for (int n = 0; n < p.n; n++) {
    float* row = out + int64_t{n} * p.k;
    if (!p.quantized) {
      ops().to_f32(row, offset(p.plain, p.plain_type, n * p.plain_stride), p.plain_type, p.k);
      continue;
    }
    const QuantMatrix& w = p.w;
    const char* scales = static_cast<const char*>(w.scales) + n * w.scale_stride;
    const char* biases = w.fp4 ? nullptr : static_cast<const char*>(w.biases) + n * w.bias_stride;
    for (int g = 0; g < p.k / w.group; g++) {
      widen_group(w, w.codes + n * w.row_bytes, g * w.group, element(scales, w.type, g),
                  biases ? element(biases, w.type, g) : 0.0f, row + g * w.group);
    }
  }
}

} // namespace edger1
