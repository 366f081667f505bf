// Products of operands packed by bf16_pack.h in matrix tiles (AMX), a block of 32 rows by 32 columns at a time. Included by
// sources compiled for them only; everything is in an anonymous namespace, as in amx_tiles.h.
//
// A tile's store holds up the products behind it until the tile is complete, so each tile is stored when the next block
// claims it.
#pragma once

#include "amx_tiles.h"
#include "bf16_pack.h"

namespace edger1 {
namespace {

// Where a block's four tiles of sums come from or go to.
struct Block {
  float* at = nullptr;
  int64_t stride = 0;

  float* tile(int i) const {
    return at + i / 2 * 16 * stride + i % 2 * 16;
  }
};

// A panel of A and one of B, `steps` times 32 of k.
struct Panels {
  const uint8_t* a;
  const uint8_t* b;
  int steps;
};

// Tile I of the block before goes to its place and begins the next block. A macro: tile numbers are assembly text.
#define EDGER1_NEXT_BLOCK(I)                           \
  if (before.at) {                                     \
    _tile_stored(I, before.tile(I), before.stride * 4); \
  }                                                    \
  if (sums.at) {                                       \
    _tile_loadd(I, sums.tile(I), sums.stride * 4);     \
  } else {                                             \
    _tile_zero(I);                                     \
  }

// Tiles 0..3 become what is at `sums`, if anywhere, plus the products of panels(0) .. panels(count - 1); what they held
// goes to `before`, if anywhere. At least one of the products has steps.
template <class GetPanels>
inline void multiply_block(int count, GetPanels&& panels, Block sums, Block before) {
  bool first = true;
  for (int p = 0; p < count; p++) {
    Panels at = panels(p);
    int step = 0;
    if (first && at.steps > 0) {
      _tile_loadd(4, at.a, 64);
      _tile_loadd(6, at.b, 64);
      EDGER1_NEXT_BLOCK(0)
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, at.b + 1024, 64);
      EDGER1_NEXT_BLOCK(1)
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, at.a + 1024, 64);
      EDGER1_NEXT_BLOCK(2)
      _tile_dpbf16ps(2, 5, 6);
      EDGER1_NEXT_BLOCK(3)
      _tile_dpbf16ps(3, 5, 7);
      first = false;
      step = 1;
      at.a += kStepBytes;
      at.b += kStepBytes;
    }
    for (; step < at.steps; step++, at.a += kStepBytes, at.b += kStepBytes) {
      _tile_loadd(4, at.a, 64);
      _tile_loadd(6, at.b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, at.b + 1024, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, at.a + 1024, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}
#undef EDGER1_NEXT_BLOCK

inline void put_down(Block block) {
  if (block.at) {
    store_sums(block.at, block.stride);
  }
}

// GCC 12 does not know that tile loads and stores reach memory.
inline void settle_memory() {
  __asm__ volatile("" ::: "memory");
}

} // namespace
} // namespace edger1
