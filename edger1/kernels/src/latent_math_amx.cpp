// Matrix tiles for bf16: both operands are rounded to bf16 and added up in f32.
//
// Blocks of 32 rows by 32 columns keep four tiles of sums and share their operands. A tile's store holds up the products
// behind it until the tile is complete, so each tile is stored when the next block claims it.
#include "latent_math.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace edger1 {
namespace {

constexpr int kTile = 32;            // rows, columns and steps of k that four products of tiles cover
constexpr int kTileElements = kTile * kTile;

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Not local: GCC 12 takes stores to a local one for dead.
const TileShapes kTileShapes;

int blocks(int n) {
  return (n + kTile - 1) / kTile;
}

int64_t a_bytes(int rows, int k) {
  return int64_t{blocks(rows)} * blocks(k) * kTileElements * 2;
}

int64_t b_bytes(int k, int columns) {
  return a_bytes(columns, k);
}

__mmask16 first16(int n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
}

// Up to 16 elements, the rest zero.
__m512 load16(const void* p, Float type, int64_t stride, int n) {
  if (stride == 1) {
    __mmask16 mask = first16(n);
    switch (type) {
      case Float::f32:
        return _mm512_maskz_loadu_ps(mask, p);
      case Float::bf16:
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
      case Float::f16:
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
    }
  }
  float values[16] = {};
  for (int i = 0; i < std::min(n, 16); i++) {
    ops().to_f32(values + i, offset(p, type, i * stride), type, 1);
  }
  return _mm512_loadu_ps(values);
}

// 32 elements as bf16.
__m512i load32(const void* p, Float type, int64_t stride, int n) {
  __m512 low = load16(p, type, stride, n), high = load16(offset(p, type, 16 * stride), type, stride, n - 16);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// [32 rows][32 steps of k][32 rows][32 bf16]
void pack_a(void* out, const void* a, Float type, int64_t row_stride, int64_t k_stride, int rows, int k) {
  auto* to = static_cast<uint16_t*>(out);
  for (int i0 = 0; i0 < rows; i0 += kTile) {
    for (int p = 0; p < k; p += kTile) {
      for (int i = i0; i < i0 + kTile; i++, to += kTile) {
        __m512i row = i < rows ? load32(offset(a, type, i * row_stride + p * k_stride), type, k_stride, k - p)
                               : _mm512_setzero_si512();
        _mm512_store_si512(to, row);
      }
    }
  }
}

void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

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

  // Elements of two rows side by side.
  __m512i operator()(__m512 even, __m512 odd) const {
    return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
  }
};

// [32 columns][32 steps of k][2 halves of the columns][16 pairs of k][16 columns][2] bf16
void pack_b(void* out, const void* b, Float type, int64_t k_stride, int64_t column_stride, int k, int columns) {
  auto* to = static_cast<uint16_t*>(out);
  int64_t panel = int64_t{blocks(k)} * kTileElements;
  auto place = [&](int j, int p) { return to + j / kTile * panel + p / kTile * kTileElements + j % kTile / 16 * (kTileElements / 2); };
  if (k_stride == 1) {
    for (int j = 0; j < blocks(columns) * kTile; j += 16) {
      for (int p = 0; p < k; p += kTile) {
        __m512i rows[16];
        for (int i = 0; i < 16; i++) {
          rows[i] = j + i < columns ? load32(offset(b, type, p + (j + i) * column_stride), type, 1, k - p)
                                    : _mm512_setzero_si512();
        }
        transpose16(rows);
        for (int i = 0; i < 16; i++) {
          _mm512_store_si512(place(j, p) + 32 * i, rows[i]);
        }
      }
    }
    return;
  }
  const Pairing pairing;
  for (int p = 0; p < blocks(k) * kTile; p += 2) {
    const void *even = offset(b, type, p * k_stride), *odd = offset(b, type, (p + 1) * k_stride);
    for (int j = 0; j < blocks(columns) * kTile; j += 16) {
      __m512 first = p < k ? load16(offset(even, type, j * column_stride), type, column_stride, columns - j) : _mm512_setzero_ps();
      __m512 second =
          p + 1 < k ? load16(offset(odd, type, j * column_stride), type, column_stride, columns - j) : _mm512_setzero_ps();
      _mm512_store_si512(place(j, p) + p % kTile * 16, pairing(first, second));
    }
  }
}

// 32 rows and columns of a result.
struct Block {
  float* at = nullptr;
  int64_t stride = 0;

  float* tile(int i) const {
    return at + i / 2 * 16 * stride + i % 2 * 16;
  }
};

// Tile I of the block before goes to its place and begins the next block. A macro: tile numbers are assembly text.
#define EDGER1_NEXT_BLOCK(I)                                \
  if (before.at) {                                          \
    _tile_stored(I, before.tile(I), before.stride * 4);     \
  }                                                         \
  if (accumulate) {                                         \
    _tile_loadd(I, block.tile(I), block.stride * 4);        \
  } else {                                                  \
    _tile_zero(I);                                          \
  }

// Tiles 0..3 become a block of the sum of products, of panels i of A and j of B; what they held goes to `before`, if anywhere.
inline void multiply(const LatentProduct* products, int count, int i, int j, bool accumulate, Block block, Block before) {
  bool first = true;
  for (int p = 0; p < count; p++) {
    int steps = blocks(products[p].k);
    auto* a = static_cast<const uint16_t*>(products[p].a) + int64_t{i} * steps * kTileElements;
    auto* b = static_cast<const uint16_t*>(products[p].b) + int64_t{j} * steps * kTileElements;
    int step = 0;
    if (first && steps > 0) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      EDGER1_NEXT_BLOCK(0)
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kTileElements / 2, 64);
      EDGER1_NEXT_BLOCK(1)
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + kTileElements / 2, 64);
      EDGER1_NEXT_BLOCK(2)
      _tile_dpbf16ps(2, 5, 6);
      EDGER1_NEXT_BLOCK(3)
      _tile_dpbf16ps(3, 5, 7);
      first = false;
      step = 1;
      a += kTileElements;
      b += kTileElements;
    }
    for (; step < steps; step++, a += kTileElements, b += kTileElements) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kTileElements / 2, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + kTileElements / 2, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}
#undef EDGER1_NEXT_BLOCK

inline void put_down(Block block) {
  if (block.at) {
    _tile_stored(0, block.tile(0), block.stride * 4);
    _tile_stored(1, block.tile(1), block.stride * 4);
    _tile_stored(2, block.tile(2), block.stride * 4);
    _tile_stored(3, block.tile(3), block.stride * 4);
  }
}

void copy_block(float* to, int64_t to_stride, const float* from, int64_t from_stride, int rows, int columns) {
  for (int i = 0; i < rows; i++) {
    std::memcpy(to + i * to_stride, from + i * from_stride, sizeof(float) * static_cast<size_t>(columns));
  }
}

// GCC 12 does not know that tile loads and stores reach memory.
inline void settle_memory() {
  __asm__ volatile("" ::: "memory");
}

void gemm(float* c, int64_t c_stride, const LatentProduct* products, int count, int m, int n, bool accumulate) {
  settle_memory();
  _tile_loadconfig(&kTileShapes);
  Block before;
  for (int j = 0; j < n; j += kTile) {
    for (int i = 0; i < m; i += kTile) {
      float* to = c + i * c_stride + j;
      int rows = std::min(kTile, m - i), columns = std::min(kTile, n - j);
      if (rows == kTile && columns == kTile) {
        Block block{to, c_stride};
        multiply(products, count, i / kTile, j / kTile, accumulate, block, before);
        before = block;
        continue;
      }
      // The result has no room for whole tiles here.
      alignas(64) float sums[kTileElements] = {};
      if (accumulate) {
        copy_block(sums, kTile, to, c_stride, rows, columns);
        settle_memory();
      }
      Block block{sums, kTile};
      multiply(products, count, i / kTile, j / kTile, accumulate, block, before);
      put_down(block);
      before = Block{};
      settle_memory();
      copy_block(to, c_stride, sums, kTile, rows, columns);
    }
  }
  put_down(before);
  _tile_release();
  settle_memory();
}

const LatentMath kMath{128, 32, a_bytes, b_bytes, pack_a, pack_b, gemm};

} // namespace

const LatentMath* const latent_math_amx = &kMath;

} // namespace edger1
#else
namespace edger1 {
const LatentMath* const latent_math_amx = nullptr;
} // namespace edger1
#endif
