// The large path of `fast` on processors with matrix tiles for bf16 (AMX, Sapphire Rapids and later).
//
// Here x and the dequantized weights are rounded to bf16 and added up in f32 tiles over all of K. That is a third of
// the error of int8 activations for each 32 columns. Those would gain little from int8 tiles, which would have to leave
// for memory after every 32 columns, to be scaled. Blocks of 32 rows of x by 32 columns of the result keep four tiles
// of sums and share their operands.
//
// A tile's store holds up the products behind it until the tile is complete, and the lines of a new result are in no cache:
// sums go to a small dense block, which is copied while the tiles of the next one are at work.
#include "qmm_tables.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "amx_tiles.h"
#include "qmm_avx512_panel.h"

namespace edger1 {
namespace {

constexpr int kUnpackColumns = 512; // columns of W that pass through bytes at a time

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

int64_t tile_scratch_bytes(const QuantMatrix& w, bool fast) {
  if (!fast) {
    return panel_scratch_bytes(w, false);
  }
  return 2 * static_cast<int64_t>(w.k / w.group) * 32 * 4 + int64_t{w.k} * 32 * 2 + int64_t{kUnpackColumns} * 32 +
      2 * int64_t{kTileRows} * kPanel * 4;
}

// Where columns k, k + 1 of rows 16 * half .. of a panel lie: [k / 32][2 halves][16 pairs of columns][16 rows][2] bf16.
inline uint16_t* pairs_at(uint16_t* pairs, int k, int half) {
  return pairs + (k / 32 * 2 + half) * 512 + k % 32 / 2 * 32;
}

// Any format, by way of bytes.
template <class F>
void unpack_pairs(const QuantMatrix& w, int n0, int n1, const float* scales, const float* biases, uint16_t* pairs,
                  uint8_t* codes) {
  const Pairing pairing;
  const __m512i low = _mm512_set1_epi32(255);
  for (int k0 = 0; k0 < w.k; k0 += kUnpackColumns) {
    int k1 = k0 + kUnpackColumns < w.k ? k0 + kUnpackColumns : w.k;
    unpack_codes<F>(w, n0, n1, k0, k1, codes);
    for (int k = k0; k < k1; k += 4) {
      for (int half = 0; half < 2; half++) {
        __m512 scale = _mm512_load_ps(scales + k / w.group * 32 + 16 * half);
        __m512 bias = _mm512_load_ps(biases + k / w.group * 32 + 16 * half);
        __m512i four = _mm512_load_si512(codes + (k - k0) * 32 + 64 * half);
        __m512 v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          __m512i code = _mm512_and_si512(_mm512_srli_epi32(four, static_cast<unsigned>(8 * i)), low);
          v[i] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(code), bias);
        }
        _mm512_store_si512(pairs_at(pairs, k, half), pairing(v[0], v[1]));
        _mm512_store_si512(pairs_at(pairs, k + 2, half), pairing(v[2], v[3]));
      }
    }
  }
}

// Four bits: the packed words are transposed as they are, eight codes at once, and looked up in a table of floats.
template <class F>
void unpack_pairs_nibbles(const QuantMatrix& w, int n0, int n1, const float* scales, const float* biases,
                          uint16_t* pairs) {
  const Pairing pairing;
  const __m512 table = F::fp4 ? _mm512_setr_ps(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)
                              : _mm512_cvtepi32_ps(iota());
  for (int half = 0; half < 2; half++) {
    int first = n0 + 16 * half;
    for (int k = 0; k < w.k; k += 128) {
      int columns = w.k - k < 128 ? w.k - k : 128;
      __m512i words[16];
      for (int i = 0; i < 16; i++) {
        words[i] = first + i < n1 ? _mm512_maskz_loadu_epi32(first16(columns / 8), codes_row(w, first + i) + k / 2)
                                  : _mm512_setzero_si512();
      }
      transpose16(words);
      for (int j = 0; j < columns / 8; j++) {
        int g = (k + 8 * j) / w.group;
        __m512 scale = _mm512_load_ps(scales + g * 32 + 16 * half), bias = _mm512_load_ps(biases + g * 32 + 16 * half);
        __m512i word = words[j];
        uint16_t* to = pairs_at(pairs, k + 8 * j, half);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(word, static_cast<unsigned>(8 * i)), table);
          __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(word, static_cast<unsigned>(8 * i + 4)), table);
          _mm512_store_si512(to + 32 * i,
                             pairing(_mm512_fmadd_ps(scale, even, bias), _mm512_fmadd_ps(scale, odd, bias)));
        }
      }
    }
  }
}

// The rows of a block from dense sums to where they go, `stride` floats apart.
inline void copy_sums(const float* sums, int rows, int columns, float* out, int64_t stride) {
  __mmask16 low = first16(columns), high = first16(columns > 16 ? columns - 16 : 0);
  for (int i = 0; i < rows; i++) {
    _mm512_mask_storeu_ps(out + i * stride, low, _mm512_load_ps(sums + i * kPanel));
    _mm512_mask_storeu_ps(out + i * stride + 16, high, _mm512_load_ps(sums + i * kPanel + 16));
  }
}

// All rows against a whole panel. A block's sums are copied while the tiles of the next one are at work.
void multiply_rows(const uint16_t* x, const uint16_t* pairs, int k, int rows, int columns, float* out, int64_t stride,
                   float* sums) {
  constexpr int kBlockFloats = kTileRows * kPanel;
  for (int i = 0, turn = 0; i < rows + kTileRows; i += kTileRows, turn ^= 1) {
    if (i < rows) {
      zero_sums();
      add_products(x + static_cast<int64_t>(i) * k, pairs, k / 32);
    }
    if (i > 0) {
      int before = i - kTileRows, count = rows - before < kTileRows ? rows - before : kTileRows;
      copy_sums(sums + (turn ^ 1) * kBlockFloats, count, columns, out + before * stride, stride);
    }
    if (i < rows) {
      store_sums(sums + turn * kBlockFloats, kPanel);
    }
  }
}

void panel_tiles(const QuantMatrix& w, const void* packed_x, int m, int n0, int n1, float* out, int64_t stride,
                 const int*, void* scratch) {
  auto* scales = static_cast<float*>(scratch);
  float* biases = scales + w.k / w.group * 32;
  auto* pairs = reinterpret_cast<uint16_t*>(biases + w.k / w.group * 32);
  auto* codes = reinterpret_cast<uint8_t*>(pairs + int64_t{w.k} * 32);
  auto* sums = reinterpret_cast<float*>(codes + kUnpackColumns * 32);
  unpack_scales(w, n0, n1, scales, biases);
  for_format(w, [&](auto format) {
    using F = decltype(format);
    if constexpr (F::bits == 4) {
      unpack_pairs_nibbles<F>(w, n0, n1, scales, biases, pairs);
    } else {
      unpack_pairs<F>(w, n0, n1, scales, biases, pairs, codes);
    }
  });
  // Nor does GCC 12 know that _tile_loadd reads memory: what was unpacked shall be there.
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&kTileShapes);
  multiply_rows(static_cast<const uint16_t*>(packed_x), pairs, w.k, m, n1 - n0, out, stride, sums);
  _tile_release();
}

} // namespace

QmmKernels qmm_with_amx(QmmKernels table) {
  table.tile_fast = kTileRows;
  table.packed_x_bytes = packed_bytes;
  table.pack_x_fast = pack_x_tiles;
  table.panel_scratch_bytes = tile_scratch_bytes;
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
