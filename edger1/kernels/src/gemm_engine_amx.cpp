// The mixed engine on processors with matrix tiles for bf16 (AMX, Sapphire Rapids and later).
//
// Both operands are packed as tiles of 16 x 16 pairs of bf16, a pair being two neighbours along k: a tile of A has a row
// for each row of A, one of B a row for each pair. A panel is 32 rows of A or 32 columns of B, [k / 32][2 tiles].
#include "gemm_engine.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "qmm_avx512_panel.h"

namespace edger1 {
namespace {

constexpr int kPanelRows = 32;
constexpr int64_t kStepBytes = 2048; // 32 rows or columns by 32 of k

int64_t ceil32(int64_t n) {
  return (n + 31) / 32;
}

size_t panel_bytes(int64_t rows, int64_t k) {
  return static_cast<size_t>(ceil32(rows) * ceil32(k) * kStepBytes);
}
size_t b_panel_bytes(int64_t k, int64_t columns) {
  return panel_bytes(columns, k);
}

// Where operand rows (of A, or columns of B) and k lie.
struct Source {
  const void* data;
  Float type;
  int64_t row_stride, k_stride;
};

inline __mmask32 first32(int n) {
  return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
}

// Pairs along k of one row, whose k are neighbours: 16 pairs of which `k` elements are there.
inline __m512i pairs_along(const Source& s, int64_t at, int k) {
  if (s.type == Float::bf16) {
    return _mm512_maskz_loadu_epi16(first32(k), static_cast<const uint16_t*>(s.data) + at);
  }
  const float* from = static_cast<const float*>(s.data) + at;
  __m512 low = _mm512_maskz_loadu_ps(first16(k), from), high = _mm512_maskz_loadu_ps(first16(k > 16 ? k - 16 : 0), from + 16);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// One pair along k of 16 rows that are neighbours.
inline __m512i pairs_across(const Source& s, int64_t at, int rows, bool both, __m512i order) {
  __mmask16 mask = first16(rows), mask2 = both ? mask : __mmask16{0};
  if (s.type == Float::bf16) {
    const uint16_t* from = static_cast<const uint16_t*>(s.data) + at;
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask2, from + s.k_stride));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  const float* from = static_cast<const float*>(s.data) + at;
  __m512 low = _mm512_maskz_loadu_ps(mask, from), high = _mm512_maskz_loadu_ps(mask2, from + s.k_stride);
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

inline __m512i pair_order() {
  alignas(64) uint16_t from[32];
  for (int i = 0; i < 16; i++) {
    from[2 * i] = static_cast<uint16_t>(i);
    from[2 * i + 1] = static_cast<uint16_t>(16 + i);
  }
  return _mm512_load_si512(from);
}

// A tile as [row][pair], or as [pair][row] with `by_pair`.
inline void pack_tile(uint8_t* out, const Source& s, int row, int rows, int k0, int k, bool by_pair, __m512i order) {
  __m512i v[16];
  bool across = s.k_stride != 1;
  if (across) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) {
      v[j] = 2 * j < k ? pairs_across(s, row * s.row_stride + (k0 + 2 * j) * s.k_stride, rows, 2 * j + 1 < k, order)
                       : _mm512_setzero_si512();
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      v[i] = i < rows ? pairs_along(s, (row + i) * s.row_stride + k0, k) : _mm512_setzero_si512();
    }
  }
  if (across != by_pair) {
    transpose16(v);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    _mm512_store_si512(out + 64 * i, v[i]);
  }
}

void pack(void* out, const Source& s, int rows, int k, bool by_pair) {
  auto* to = static_cast<uint8_t*>(out);
  const __m512i order = pair_order();
  for (int row = 0; row < rows; row += kPanelRows) {
    for (int k0 = 0; k0 < k; k0 += 32) {
      int depth = k - k0 < 32 ? k - k0 : 32;
      for (int half = 0; half < 2; half++) {
        int first = row + 16 * half, count = rows - first < 16 ? (rows - first > 0 ? rows - first : 0) : 16;
        pack_tile(to, s, first, count, k0, depth, by_pair, order);
        to += 1024;
      }
    }
  }
}

void pack_a(void* out, const Matrix& a, int rows, int k) {
  pack(out, {a.data, a.type, a.row_stride, a.column_stride}, rows, k, false);
}
void pack_b(void* out, const Matrix& b, int k, int columns) {
  pack(out, {b.data, b.type, b.column_stride, b.row_stride}, columns, k, true);
}

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
