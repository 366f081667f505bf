// The large path of `fast` on processors with matrix tiles for bf16 (AMX, Sapphire Rapids and later).
//
// Here x and the dequantized weights are rounded to bf16 and added up in f32 tiles over all of K. That is a third of
// the error of int8 activations for each 32 columns. Those would gain little from int8 tiles, which would have to leave
// for memory after every 32 columns, to be scaled. Blocks of 32 rows of x by 32 columns of the result keep four tiles
// of sums and share their operands.
#include "qmm_tables.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "amx_panel.h"

namespace edger1 {
namespace {

int64_t packed_bytes(const QuantMatrix& w, bool fast) {
  return fast ? static_cast<int64_t>(w.k) * kTileRows * 2 : packed_x_bytes(w, false);
}

// [32 columns of W][32 rows][32 bf16]
void pack_x_tiles(const QuantMatrix& w, const float* const* x, int count, const int*, void* packed) {
  auto* to = static_cast<uint16_t*>(packed);
  for (int i = 0; i < kTileRows; i++) {
    for (int k = 0; k < w.k; k += 32) {
      __m512i values = i < count ? to_bf16(_mm512_loadu_ps(x[i] + k), _mm512_loadu_ps(x[i] + k + 16))
                                 : _mm512_setzero_si512();
      _mm512_store_si512(to + static_cast<int64_t>(k) * kTileRows + i * 32, values);
    }
  }
}

int64_t scratch_bytes(const QuantMatrix& w, bool fast) {
  return fast ? TilePanel::scratch_bytes(w) : panel_scratch_bytes(w, false);
}

void panel_tiles(const QuantMatrix& w, const void* packed_x, int m, int n0, int n1, float* out, int64_t stride,
                 const int*, void* scratch) {
  const __mmask16 low = first16(n1 - n0), high = first16(n1 - n0 > 16 ? n1 - n0 - 16 : 0);
  TilePanel(w, n0, n1, scratch).multiply(packed_x, m, [&](int row, int count, const float* sums) {
    for (int i = 0; i < count; i++) {
      float* to = out + (row + i) * stride;
      _mm512_mask_storeu_ps(to, low, _mm512_load_ps(sums + i * kPanel));
      _mm512_mask_storeu_ps(to + 16, high, _mm512_load_ps(sums + i * kPanel + 16));
    }
  }, [&](int row) {
    for (int i = 0; i < kTileRows; i++) {
      _mm_prefetch(out + (row + i) * stride, _MM_HINT_ET0);
      _mm_prefetch(out + (row + i) * stride + 16, _MM_HINT_ET0);
    }
  });
}

} // namespace

QmmKernels qmm_with_amx(QmmKernels table) {
  table.tile_fast = kTileRows;
  table.packed_x_bytes = packed_bytes;
  table.pack_x_fast = pack_x_tiles;
  table.panel_scratch_bytes = scratch_bytes;
  table.panel_fast = panel_tiles;
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
