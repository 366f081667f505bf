// The large path of `fast` on processors with matrix tiles for int8 (AMX, Sapphire Rapids and later).
//
// A tile product covers 16 rows of x, 16 columns of the result and one block of 32 columns of W, whose sums leave the tile
// for memory to be scaled. The panel is the one of the other AVX-512 path and every sum is formed in the same order, so
// the results are the same bits.
#include "qmm_tables.h"

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__)
#include "qmm_avx512_panel.h"

namespace edger1 {
namespace {

constexpr int kTileRows = 16;

struct PackedTiles {
  int64_t scales, sums, bytes;
  explicit PackedTiles(const QuantMatrix& w) {
    scales = static_cast<int64_t>(w.k) * kTileRows;
    sums = scales + static_cast<int64_t>(w.k) / kBlock * kTileRows * 4;
    bytes = padded(sums + static_cast<int64_t>(w.k) / w.group * kTileRows * 4, 64);
  }
};

int64_t packed_bytes(const QuantMatrix& w, bool fast) {
  return fast ? PackedTiles(w).bytes : packed_x_bytes(w, false);
}

// [block][16 rows][32 bytes], then block scales and group sums as [block or group][16 rows].
void pack_x_tiles(const QuantMatrix& w, const float* const* x, int count, void* packed) {
  PackedTiles at(w);
  auto* bytes = static_cast<int8_t*>(packed);
  auto* scales = reinterpret_cast<float*>(bytes + at.scales);
  auto* sums = reinterpret_cast<float*>(bytes + at.sums);
  int per = w.group / kBlock;
  for (int i = 0; i < kTileRows; i++) {
    for (int b = 0; b < w.k / kBlock; b++) {
      __m256i codes = _mm256_setzero_si256();
      int sum = 0;
      float scale = i < count ? quantize_block(x[i] + static_cast<int64_t>(b) * kBlock, codes, sum) : 0.0f;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + (int64_t{b} * kTileRows + i) * kBlock), codes);
      scales[b * kTileRows + i] = scale;
      float& total = sums[b / per * kTileRows + i];
      total = (b % per == 0 ? 0.0f : total) + scale * static_cast<float>(sum);
    }
  }
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileShapes() {
    row_bytes[0] = row_bytes[1] = 64; // sums: 16 rows of 16 int32
    rows[0] = rows[1] = 16;
    row_bytes[2] = 32; // x: 16 rows of 32 int8
    rows[2] = 16;
    row_bytes[3] = 64; // W: 8 steps of 4 columns for 16 columns of the result
    rows[3] = 8;
  }
};

inline void add_block(const int32_t* sum, const float* scales, const float* x_scales, __m512* total) {
  __m512 scale = _mm512_load_ps(scales);
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; m++) {
    total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sum + m * 16)),
                               _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[m])), total[m]);
  }
}

// 16 rows by 16 columns over all of K.
inline void tile_amx(const uint8_t* panel, const float* scales, const float* biases, const void* packed,
                     const QuantMatrix& w, const PackedTiles& at, int rows, int columns, float* out, int64_t stride) {
  alignas(64) int32_t sum[2][256];
  const auto* x = static_cast<const int8_t*>(packed);
  const auto* x_scales = reinterpret_cast<const float*>(x + at.scales);
  const auto* x_sums = reinterpret_cast<const float*>(x + at.sums);
  const int per = w.group / kBlock, blocks = w.k / kBlock;
  __m512 total[kTileRows];
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; m++) {
    total[m] = _mm512_setzero_ps();
  }
  auto multiply = [&](int b) {
    _tile_zero(0);
    _tile_loadd(2, x + static_cast<int64_t>(b) * kTileRows * kBlock, kBlock);
    _tile_loadd(3, panel + static_cast<int64_t>(b) * 1024, 128);
    _tile_dpbsud(0, 2, 3);
    _tile_stored(0, sum[b & 1], 64);
  };
  multiply(0);
  for (int b = 0; b < blocks; b++) {
    if (b + 1 < blocks) {
      multiply(b + 1); // the tile unit works on the next block while this one is scaled
    }
    int g = b / per;
    add_block(sum[b & 1], scales + g * 32, x_scales + b * kTileRows, total);
    if ((b + 1) % per == 0) {
      __m512 bias = _mm512_load_ps(biases + g * 32);
#pragma GCC unroll 16
      for (int m = 0; m < kTileRows; m++) {
        total[m] = _mm512_fmadd_ps(bias, _mm512_set1_ps(x_sums[g * kTileRows + m]), total[m]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; m++) {
    if (m < rows) {
      _mm512_mask_storeu_ps(out + m * stride, first16(columns), total[m]);
    }
  }
}

void panel_amx(const QuantMatrix& w, const void* packed_x, int m, int n0, int n1, float* out, int64_t stride,
               void* scratch) {
  auto* scales = static_cast<float*>(scratch);
  float* biases = scales + w.k / w.group * 32;
  auto* panel = reinterpret_cast<uint8_t*>(biases + w.k / w.group * 32);
  unpack_scales(w, n0, n1, scales, biases);
  for_format(w, [&](auto format) { unpack_codes<decltype(format)>(w, n0, n1, 0, w.k, panel); });
  PackedTiles at(w);
  TileShapes shapes;
  _tile_loadconfig(&shapes);
  for (int i = 0; i < m; i += kTileRows) {
    for (int c = 0; c < n1 - n0; c += 16) {
      tile_amx(panel + 4 * c, scales + c, biases + c, static_cast<const char*>(packed_x) + i / kTileRows * at.bytes, w,
               at, m - i < kTileRows ? m - i : kTileRows, n1 - n0 - c, out + i * stride + c, stride);
    }
  }
  _tile_release();
}

} // namespace

QmmKernels qmm_with_amx(QmmKernels table) {
  table.tile_fast = kTileRows;
  table.packed_x_bytes = packed_bytes;
  table.pack_x_fast = pack_x_tiles;
  table.panel_fast = panel_amx;
  return table;
}

} // namespace edger1
#else
namespace edger1 {
QmmKernels qmm_with_amx(QmmKernels table) {
  return table;
}
} // namespace edger1
#endif
