// The mixed engine on processors with matrix tiles for bf16 (AMX, Sapphire Rapids and later).
#include "gemm_engine.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "amx_blocks.h"

namespace edger1 {
namespace {

// Blocks at the edges, for which the result has no room, go through memory of their own.
void edge_block(float* c, int64_t c_stride, const uint8_t* a, const uint8_t* b, int rows, int columns, int steps,
                bool accumulate) {
  alignas(64) float sums[32 * 32];
  multiply_block(1, [&](int) { return Panels{a, b, steps}; }, Block{}, Block{});
  put_down(Block{sums, 32});
  settle_memory();
  for (int i = 0; i < rows; i++) {
    for (int j = 0; j < columns; j += 16) {
      __mmask16 mask = first16(columns - j < 16 ? columns - j : 16);
      __m512 sum = _mm512_load_ps(sums + 32 * i + j);
      float* to = c + i * c_stride + j;
      _mm512_mask_storeu_ps(to, mask, accumulate ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum) : sum);
    }
  }
}

void gemm(float* c, int64_t c_stride, const void* a_in, const void* b_in, int m, int n, int k, bool accumulate) {
  const auto *a = static_cast<const uint8_t*>(a_in), *b = static_cast<const uint8_t*>(b_in);
  const int steps = static_cast<int>(ceil32(k));
  settle_memory();
  _tile_loadconfig(&kTileShapes);
  Block before;
  for (int j = 0; j < n; j += 32) {
    const uint8_t* panel = b + j / 32 * steps * kStepBytes;
    for (int i = 0; i < m; i += 32) {
      const uint8_t* rows = a + i / 32 * steps * kStepBytes;
      float* to = c + i * c_stride + j;
      if (m - i >= 32 && n - j >= 32) {
        for (int r = 0; r < 32; r++) {
          _mm_prefetch(to + r * c_stride, _MM_HINT_ET0);
          _mm_prefetch(to + r * c_stride + 16, _MM_HINT_ET0);
        }
        multiply_block(1, [&](int) { return Panels{rows, panel, steps}; }, accumulate ? Block{to, c_stride} : Block{}, before);
        before = Block{to, c_stride};
      } else {
        put_down(before);
        before = Block{};
        edge_block(to, c_stride, rows, panel, m - i < 32 ? m - i : 32, n - j < 32 ? n - j : 32, steps, accumulate);
      }
    }
  }
  put_down(before);
  _tile_release();
  settle_memory();
}

const GemmEngine engine{Float::bf16, 32, panel_bytes, b_panel_bytes, pack_a, pack_b, gemm};

} // namespace

const GemmEngine* const gemm_engine_amx = &engine;

} // namespace edger1
#else
namespace edger1 {
const GemmEngine* const gemm_engine_amx = nullptr;
} // namespace edger1
#endif
