// What each instruction set offers to reading quantized rows back: plain functions on pointers, without threads or MLX.
#pragma once

#include <cstdint>

#include "ops_table.h"

namespace edger1 {

// A row as mx.quantize stores it: codes of `bits` bits one after another, little-endian; for each `group` of them a scale
// and a bias (value = scale * code + bias). mxfp4 has codes of four bits that stand for e2m1 floats, and a byte, the
// exponent of a power of two, for each group.
struct QuantizedRow {
  const uint8_t* codes;
  const void* scales;
  const void* biases;
  Float type;           // of scales and biases
  int group, bits;
  bool mxfp4;
};

struct DequantizeOps {
  // n values, a multiple of the group.
  void (*row)(float* out, const QuantizedRow& row, int64_t n);
  // out[r][j] = sum of x[r, i] * value j of row i, for the n values of each of `rows` rows whose codes and scales lie so
  // many bytes apart; x [m, rows]. What is in out[r] does not depend on m. Affine of 2, 4 or 8 bits only.
  void (*back)(float* const* out, const float* x, int m, int rows, const QuantizedRow& first, int64_t code_bytes,
               int64_t scale_bytes, int64_t n);
};

extern const DequantizeOps dequantize_portable;
extern const DequantizeOps dequantize_avx2;
extern const DequantizeOps dequantize_avx512vnni;
extern const DequantizeOps dequantize_neon;

// The table of the instruction set in use.
const DequantizeOps& dequantize_ops();

} // namespace edger1
