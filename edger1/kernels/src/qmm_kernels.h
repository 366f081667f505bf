// The interface between the quantized matmul's driver (qmm_driver.cpp) and its inner loops, one table an instruction set.
//
// A quantized matrix is MLX's: row n holds K codes of `bits` bits, packed little-endian without gaps, and one scale and
// bias for each group of columns; its value is scale * code + bias. The 4-bit floats of mxfp4 (OCP Microscaling Formats
// 1.0: E2M1 elements, one E8M0 scale for 32) are seen as 0.5 * scale * (T[code] - 12) with T = 2 * value + 12, so that
// they are unsigned integers too.
//
// `exact` keeps activations in f32. `fast` quantizes them to int8 with scale max |x| / 127, and a group's bias multiplies
// the sum of what was so quantized. Language models have a few channels of far larger activations than the rest, which
// would cost their neighbours under the same scale most of their bits (a mean KL of 2.5e-3 nats on SmolLM2-135M with
// llama.cpp's scale for each 32). Up to 16 rows, the small path, therefore have a scale for each 8 elements; the large path
// has one for each 32 and multiplies the 16 channels that are largest over all rows in f32. (AMX has its own way there.)
#pragma once

#include <cstddef>
#include <cstdint>

namespace edger1 {

enum class ScaleType : uint8_t { f32, f16, bf16, e8m0 };

constexpr int kBlock = 32;           // columns that every format packs into whole words
constexpr int kScaled = 8;           // columns that share one activation scale on the small path
constexpr int kOutliers = 16;        // channels that the large path keeps in f32
constexpr int kSuperBlock = 512;     // prepared rows are padded with zeros to a multiple of this
constexpr int kMaxRows = 16;         // up to so many rows take the path that is bit-identical for each row
constexpr int kPanel = 32;           // columns of the result that one panel of the large path computes

struct QuantMatrix {
  const uint8_t* codes = nullptr;
  const void* scales = nullptr;
  const void* biases = nullptr;      // null for mxfp4
  int64_t row_bytes = 0;             // from one row's codes to the next
  int64_t scale_stride = 0;          // from one row's scales to the next, in bytes
  int64_t bias_stride = 0;
  int n = 0;                         // rows
  int k = 0;                         // columns, a multiple of group
  int group = 0;
  int bits = 0;
  bool fp4 = false;
  ScaleType type = ScaleType::f32;   // of scales and biases
  float bias_ratio = 0;              // where not 0, every bias is exactly this times its scale and need not be read
};

// A prepared row of the small path: int8 or f32 values in the order that the kernel for these bits wants, scales (fast
// only, at most one for each 4 elements, as the kernel wants them), sums of groups.
struct PreparedLayout {
  int64_t scales = 0;                // offsets in bytes
  int64_t sums = 0;
  int64_t bytes = 0;
};

constexpr int64_t padded(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline PreparedLayout prepared_layout(int k, bool fast) {
  int64_t columns = padded(k, kSuperBlock);
  PreparedLayout layout;
  layout.scales = columns * (fast ? 1 : 4);
  layout.sums = layout.scales + (fast ? columns : 0);
  // Sums of groups of 32 at the most, padded so that 16 can be read at any multiple of 16; 64 bytes against strides that
  // are a power of two.
  layout.bytes = layout.sums + padded(columns / kBlock, 16) * 4 + 64;
  return layout;
}

struct QmmKernels {
  // Rows of x that one tile of the large path holds.
  int tile_fast;
  int tile_exact;

  // Prepares one row of K floats for the small path.
  void (*prepare_fast)(const QuantMatrix& w, const float* x, void* prepared);
  void (*prepare_exact)(const QuantMatrix& w, const float* x, void* prepared);

  // The small path: out[i][n - n0] for rows i < m <= kMaxRows of x and weight rows n0 <= n < n1.
  void (*rows_fast)(const QuantMatrix& w, const void* const* prepared, int m, int n0, int n1, float* const* out);
  void (*rows_exact)(const QuantMatrix& w, const void* const* prepared, int m, int n0, int n1, float* const* out);

  // The large path. pack_x_* writes `count` rows (at most a tile) in the tile's order, rest zero; its size is
  // packed_x_bytes. panel_* computes out[i * stride + n - n0] for all `m` packed rows and n0 <= n < n1 <= n0 + kPanel.
  int64_t (*packed_x_bytes)(const QuantMatrix& w, bool fast);
  // `outliers` are kOutliers different columns of W.
  void (*pack_x_fast)(const QuantMatrix& w, const float* const* x, int count, const int* outliers, void* packed);
  void (*pack_x_exact)(const QuantMatrix& w, const float* const* x, int count, void* packed);
  int64_t (*panel_scratch_bytes)(const QuantMatrix& w, bool fast);
  void (*panel_fast)(const QuantMatrix& w, const void* packed_x, int m, int n0, int n1, float* out, int64_t stride,
                     const int* outliers, void* scratch);
  void (*panel_exact)(const QuantMatrix& w, const void* packed_x, int m, int n0, int n1, float* out, int64_t stride,
                      void* scratch);

  // W instead of its transpose: out[i * stride + k - k0] = sum over n of x[i][n] * W[n][k], k0 <= k < k1 <= k0 + kPanel;
  // x is packed by pack_x_f32 (rows of `n` floats).
  int64_t (*packed_f32_bytes)(int n);
  void (*pack_x_f32)(int n, const float* const* x, int count, void* packed);
  int64_t (*back_scratch_bytes)(const QuantMatrix& w);
  void (*panel_back)(const QuantMatrix& w, const void* packed_x, int m, int k0, int k1, float* out, int64_t stride,
                     void* scratch);

  // Raises each of `count` entries of `largest` to |x|.
  void (*raise_to)(const float* x, int64_t count, float* largest);

  // Conversions of contiguous runs; `type` is f32, f16 or bf16.
  void (*to_f32)(const void* from, ScaleType type, int64_t count, float* to);
  void (*from_f32)(const float* from, ScaleType type, int64_t count, void* to);
};

} // namespace edger1
