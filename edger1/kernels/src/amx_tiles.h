// Products of bf16 in matrix tiles (AMX). Included by sources compiled for them only; everything is in an anonymous
// namespace, so that no copy of it can stand in for another instruction set's.
//
// A block is 32 rows by 32 columns: four tiles of sums that share two tiles of rows, [32 of k][32 rows][32 bf16], and two
// of columns, [32 of k][2 halves][16 pairs of k][16 columns][2].
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace edger1 {
namespace {

constexpr int kTileRows = 32;

inline __m512i to_bf16(__m512 first, __m512 second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// Two values of k for 16 columns as the pairs of bf16 that a tile product takes.
struct Pairing {
  __m512i order;

  Pairing() {
    alignas(64) uint16_t from[32];
    for (int i = 0; i < 16; i++) {
      from[2 * i] = static_cast<uint16_t>(i);
      from[2 * i + 1] = static_cast<uint16_t>(16 + i);
    }
    order = _mm512_load_si512(from);
  }

  __m512i operator()(__m512 even, __m512 odd) const {
    return _mm512_permutexvar_epi16(order, to_bf16(even, odd));
  }
};

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Not local: GCC 12 thinks that _tile_loadconfig reads eight bytes of it and may drop stores to the rest as dead.
const TileShapes kTileShapes;

// Tiles 0..3 gain the products of 32 rows and 32 columns over `steps` times 32 of k. Rows pass once, columns shall stay in
// L1: loads of rows do not go through it.
inline void add_products(const uint16_t* x, const uint16_t* pairs, int steps) {
  for (int i = 0; i < steps; i++) {
    _tile_stream_loadd(4, x, 64);
    _tile_loadd(6, pairs, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, pairs + 512, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, x + 512, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    x += 1024;
    pairs += 1024;
  }
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Rows of a block of sums are `stride` floats apart.
inline void load_sums(const float* sums, int64_t stride) {
  _tile_loadd(0, sums, stride * 4);
  _tile_loadd(1, sums + 16, stride * 4);
  _tile_loadd(2, sums + 16 * stride, stride * 4);
  _tile_loadd(3, sums + 16 * stride + 16, stride * 4);
}

inline void store_sums(float* sums, int64_t stride) {
  _tile_stored(0, sums, stride * 4);
  _tile_stored(1, sums + 16, stride * 4);
  _tile_stored(2, sums + 16 * stride, stride * 4);
  _tile_stored(3, sums + 16 * stride + 16, stride * 4);
}

} // namespace
} // namespace edger1
