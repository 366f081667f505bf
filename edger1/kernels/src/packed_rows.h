// Rows of a quantized KV cache, each in one piece: codes as mx.quantize packs them, then for every group a scale, then for
// every group a bias, in 16-bit floats. One array holds keys, another one values, as where they are plain numbers.
#pragma once

#include <cstdint>

#include "dequantize.h"

namespace edger1 {

struct RowFormat {
  int bits = 0;                      // 4 or 8; 0 for rows of plain numbers
  int group = 0;                     // 32, 64 or 128

  bool packed() const {
    return bits != 0;
  }
  // Whether rows of `dim` numbers can be held so.
  bool fits(int dim) const {
    return (bits == 4 || bits == 8) && (group == 32 || group == 64 || group == 128) && dim > 0 && dim % group == 0;
  }
  // Elements of 32 bits in a row.
  int words(int dim) const {
    return packed() ? dim * bits / 32 + dim / group : dim;
  }
  bool operator==(const RowFormat&) const = default;
};

// The row of `dim` numbers that lies at `row`.
inline QuantizedRow packed_row(const void* row, int dim, RowFormat format) {
  auto* codes = static_cast<const uint8_t*>(row);
  const uint8_t* scales = codes + dim * format.bits / 8;
  return {codes, scales, scales + dim / format.group * 2, Float::f16, format.group, format.bits, false};
}

// n rows from `rows` on, which lie `stride` words apart, as floats [n, dim].
void unpack_rows(float* out, const void* rows, int64_t stride, int n, int dim, RowFormat format);

// Packs a row of `dim` floats, which are rounded to 16 bits before; what those cannot hold becomes their largest number.
// The codes, scales and biases are those of mx.quantize for these numbers in float32.
void pack_row(void* to, const float* from, int dim, RowFormat format);

// The rows of a float array [..., D] packed: uint32 [..., D * bits / 32 + D / group]. CPU only; throws
// std::invalid_argument for another dtype, and rows that the format does not fit.
mx::array packed_rows(const mx::array& x, int group, int bits, mx::StreamOrDevice s = {});

} // namespace edger1
