// The mixed engine on processors with matrix tiles for bf16 (AMX, Sapphire Rapids and later).
#include "gemm_engine.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "bf16_pack.h"

namespace edger1 {
namespace {

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Not local: GCC 12 thinks that _tile_loadconfig reads eight bytes of it and may drop stores to the rest as dead.
const TileShapes kTileShapes;

// Where a block's four tiles of sums come from or go to.
struct Block {
  float* at = nullptr;
  int64_t stride = 0;

  float* tile(int i) const {
    return at + i / 2 * 16 * stride + i % 2 * 16;
  }
};

// Stores tile I of the block before and begins this one: a store holds up the products behind it until its tile is
// complete, so it waits until the tile is needed. A macro: tile numbers are assembly text.
#define EDGER1_NEXT_BLOCK(I)                                   \
  if (before.at) {                                             \
    _tile_stored(I, before.tile(I), before.stride * 4);        \
  }                                                            \
  if (sums.at) {                                               \
    _tile_loadd(I, sums.tile(I), sums.stride * 4);             \
  } else {                                                     \
    _tile_zero(I);                                             \
  }

inline void multiply(const uint8_t* a, const uint8_t* b, int steps, Block sums, Block before) {
  _tile_loadd(4, a, 64);
  _tile_loadd(6, b, 64);
  EDGER1_NEXT_BLOCK(0)
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b + 1024, 64);
  EDGER1_NEXT_BLOCK(1)
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, a + 1024, 64);
  EDGER1_NEXT_BLOCK(2)
  _tile_dpbf16ps(2, 5, 6);
  EDGER1_NEXT_BLOCK(3)
  _tile_dpbf16ps(3, 5, 7);
  for (int i = 1; i < steps; i++) {
    a += kStepBytes;
    b += kStepBytes;
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 1024, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 1024, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}
#undef EDGER1_NEXT_BLOCK

inline void store_all(Block block) {
  _tile_stored(0, block.tile(0), block.stride * 4);
  _tile_stored(1, block.tile(1), block.stride * 4);
  _tile_stored(2, block.tile(2), block.stride * 4);
  _tile_stored(3, block.tile(3), block.stride * 4);
}

// Blocks at the edges, for which the result has no room, go through memory of their own.
void edge_block(float* c, int64_t c_stride, const uint8_t* a, const uint8_t* b, int rows, int columns, int steps,
                bool accumulate) {
  alignas(64) float sums[32 * 32];
  multiply(a, b, steps, Block{}, Block{});
  store_all(Block{sums, 32});
  __asm__ volatile("" ::: "memory");
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
  // GCC 12 does not know that _tile_loadd reads memory: what was packed shall be there.
  __asm__ volatile("" ::: "memory");
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
        multiply(rows, panel, steps, accumulate ? Block{to, c_stride} : Block{}, before);
        before = Block{to, c_stride};
      } else {
        if (before.at) {
          store_all(before);
          before = Block{};
        }
        edge_block(to, c_stride, rows, panel, m - i < 32 ? m - i : 32, n - j < 32 ? n - j : 32, steps, accumulate);
      }
    }
  }
  if (before.at) {
    store_all(before);
  }
  _tile_release();
  __asm__ volatile("" ::: "memory");
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
