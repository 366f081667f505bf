// Vectors of 8 floats or integers and of 32 bytes, as the compiler's own vector types: two or four registers where the
// instruction set has shorter ones. Anonymous namespace, as everything that is compiled once an instruction set.
#pragma once

#include "few_bytes.h"
#include "qmm_kernels.h"

namespace edger1 {
namespace {

using f8 = float __attribute__((vector_size(32)));
using i8 = int32_t __attribute__((vector_size(32)));
using b32 = uint8_t __attribute__((vector_size(32)));

inline f8 load8(const float* p) {
  f8 v;
  __builtin_memcpy(&v, p, 32);
  return v;
}

inline void store8(float* p, f8 v) {
  __builtin_memcpy(p, &v, 32);
}

inline void store32(uint8_t* p, b32 v) {
  __builtin_memcpy(p, &v, 32);
}

inline f8 set8(float v) {
  return f8{v, v, v, v, v, v, v, v};
}

inline f8 to_f8(i8 v) {
  return __builtin_convertvector(v, f8);
}

template <int Bits, bool Fp4>
struct Format {
  static constexpr int bits = Bits;
  static constexpr bool fp4 = Fp4;
  static constexpr int largest = Fp4 ? 24 : (1 << Bits) - 1;
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

constexpr uint8_t kFp4Table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 0) {
    float value = static_cast<float>(fraction) * 0x1p-24f;
    return bits_to_float(float_to_bits(value) | sign);
  }
  return bits_to_float(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

inline uint16_t float_to_half(float value) {
  uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000;
  float magnitude = bits_to_float(bits & 0x7fffffff);
  if (magnitude != magnitude) {
    return static_cast<uint16_t>(sign | 0x7e00);
  }
  if (magnitude >= 65520.0f) {
    return static_cast<uint16_t>(sign | 0x7c00);
  }
  if (magnitude < 0x1p-14f) {
    // Adding 0.5 leaves the subnormal's bits, rounded to nearest even, at the bottom.
    return static_cast<uint16_t>(sign | (float_to_bits(magnitude + 0.5f) - float_to_bits(0.5f)));
  }
  uint32_t rounded = float_to_bits(magnitude) + 0xfff + (float_to_bits(magnitude) >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112 << 10)));
}

inline float bf16_to_float(uint16_t value) {
  return bits_to_float(static_cast<uint32_t>(value) << 16);
}

inline uint16_t float_to_bf16(float value) {
  uint32_t bits = float_to_bits(value);
  if (value != value) {
    return 0x7fc0;
  }
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// 2^(code - 127); 255 is NaN (OCP Microscaling Formats 1.0).
inline float e8m0_to_float(uint8_t code) {
  return bits_to_float(code == 255 ? 0x7fc00000u : code == 0 ? 1u << 22 : static_cast<uint32_t>(code) << 23);
}

inline void convert_any(const void* from, ScaleType type, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i++) {
    switch (type) {
      case ScaleType::f32:
        to[i] = static_cast<const float*>(from)[i];
        break;
      case ScaleType::f16:
        to[i] = half_to_float(static_cast<const uint16_t*>(from)[i]);
        break;
      case ScaleType::bf16:
        to[i] = bf16_to_float(static_cast<const uint16_t*>(from)[i]);
        break;
      case ScaleType::e8m0:
        to[i] = e8m0_to_float(static_cast<const uint8_t*>(from)[i]);
        break;
    }
  }
}

inline void convert_back(const float* from, ScaleType type, int64_t count, void* to) {
  for (int64_t i = 0; i < count; i++) {
    if (type == ScaleType::f32) {
      static_cast<float*>(to)[i] = from[i];
    } else {
      static_cast<uint16_t*>(to)[i] = type == ScaleType::f16 ? float_to_half(from[i]) : float_to_bf16(from[i]);
    }
  }
}

// Eight codes of Bits bits as the bytes of a word: they become two fours with room between, those four twos.
template <int Bits>
inline uint64_t spread_eight(uint64_t word) {
  constexpr uint64_t four = (uint64_t{1} << 4 * Bits) - 1;
  constexpr uint64_t two = ((uint64_t{1} << 2 * Bits) - 1) * 0x0000000100000001;
  constexpr uint64_t one = ((uint64_t{1} << Bits) - 1) * 0x0001000100010001;
  word = (word & four) | (word >> 4 * Bits) << 32;
  word = (word & two) | (word >> 2 * Bits & two) << 16;
  return (word & one) | (word >> Bits & one) << 8;
}

// 32 codes by shifting 64-bit words: what every instruction set can do. Where codes straddle bytes, storing them one by
// one takes twice as long as spreading eight at once; where none does, it is the spreading that takes longer.
template <class F>
inline b32 decode32_any(const uint8_t* p) {
  b32 v;
  if constexpr (8 % F::bits != 0) {
    constexpr int bits = F::bits;
    using Words = uint64_t __attribute__((vector_size(32)));
    Words words{spread_eight<bits>(load_bytes<bits>(p)), spread_eight<bits>(load_bytes<bits>(p + bits)),
                spread_eight<bits>(load_bytes<bits>(p + 2 * bits)), spread_eight<bits>(load_bytes<bits>(p + 3 * bits))};
    __builtin_memcpy(&v, &words, 32);
  } else {
    alignas(32) uint8_t code[32];
    for (int q = 0; q < 4; q++) {
      uint64_t word = 0;
      __builtin_memcpy(&word, p + q * F::bits, F::bits);
      for (int i = 0; i < 8; i++) {
        auto one = static_cast<uint8_t>(word >> (F::bits * i) & ((1u << F::bits) - 1));
        code[8 * q + i] = F::fp4 ? kFp4Table[one] : one;
      }
    }
    __builtin_memcpy(&v, code, 32);
  }
  return v;
}

} // namespace
} // namespace edger1
