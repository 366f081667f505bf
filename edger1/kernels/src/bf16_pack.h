// Operands of products in bf16, packed alike for matrix tiles (AMX) and for vectors. Included by sources compiled for
// AVX512-BF16 only; everything is in an anonymous namespace, so that no copy of it can stand in for another instruction
// set's.
//
// Both operands are packed as tiles of 16 x 16 pairs of bf16, a pair being two neighbours along k: a tile of A has a row
// for each row of A, one of B a row for each pair. A panel is 32 rows of A or 32 columns of B, [k / 32][2 tiles].
#pragma once

#include "gemm_engine.h"
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

// Where operand rows (of A, or columns of B) and k lie. One of the strides had better be 1.
struct Source {
  const void* data;
  Float type;
  int64_t row_stride, k_stride;
};

inline __mmask32 first32(int n) {
  return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
}

// 16 neighbouring f32 or f16.
inline __m512 load_floats(const Source& s, int64_t at, __mmask16 mask) {
  return s.type == Float::f16 ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(s.data) + at))
                              : _mm512_maskz_loadu_ps(mask, static_cast<const float*>(s.data) + at);
}

// Pairs along k of one row, whose k are neighbours: 16 pairs of which `k` elements are there.
inline __m512i pairs_along(const Source& s, int64_t at, int k) {
  if (s.type == Float::bf16) {
    return _mm512_maskz_loadu_epi16(first32(k), static_cast<const uint16_t*>(s.data) + at);
  }
  __m512 low = load_floats(s, at, first16(k)), high = load_floats(s, at + 16, first16(k > 16 ? k - 16 : 0));
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
  __m512 low = load_floats(s, at, mask), high = load_floats(s, at + s.k_stride, mask2);
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

// A tile of a source whose elements are neighbours along neither axis.
inline void pack_scattered(uint8_t* out, const Source& s, int row, int rows, int k0, int k, bool by_pair, __m512i order) {
  alignas(64) float dense[16 * 32] = {};
  for (int i = 0; i < rows; i++) {
    for (int j = 0; j < k; j++) {
      ops().to_f32(dense + 32 * i + j, offset(s.data, s.type, (row + i) * s.row_stride + (k0 + j) * s.k_stride), s.type, 1);
    }
  }
  pack_tile(out, {dense, Float::f32, 32, 1}, 0, rows, 0, k, by_pair, order);
}

void pack(void* out, const Source& s, int rows, int k, bool by_pair) {
  auto* to = static_cast<uint8_t*>(out);
  const __m512i order = pair_order();
  const bool scattered = s.row_stride != 1 && s.k_stride != 1;
  auto both_tiles = [&](int row, int k0) {
    uint8_t* at = to + (row / kPanelRows * ceil32(k) + k0 / 32) * kStepBytes;
    int depth = k - k0 < 32 ? k - k0 : 32;
    for (int half = 0; half < 2; half++) {
      int first = row + 16 * half, count = rows - first < 16 ? (rows - first > 0 ? rows - first : 0) : 16;
      (scattered ? pack_scattered : pack_tile)(at + 1024 * half, s, first, count, k0, depth, by_pair, order);
    }
  };
  // Either way the source is read in the order in which it lies.
  if (s.k_stride == 1) {
    for (int row = 0; row < rows; row += kPanelRows) {
      for (int k0 = 0; k0 < k; k0 += 32) {
        both_tiles(row, k0);
      }
    }
  } else {
    for (int k0 = 0; k0 < k; k0 += 32) {
      for (int row = 0; row < rows; row += kPanelRows) {
        both_tiles(row, k0);
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

} // namespace
} // namespace edger1
