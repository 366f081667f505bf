// The large path of `fast` on processors with matrix tiles for bf16 (AMX, Sapphire Rapids and later).
//
// Here x and the dequantized weights are rounded to bf16 and added up in f32 tiles over all of K. That is a third of
// the error of int8 activations for each 32 columns. Those would gain little from int8 tiles, which would have to leave
// for memory after every 32 columns, to be scaled. Blocks of 32 rows of x by 32 columns of the result keep four tiles
// of sums and share their operands.
//
// The tile unit takes 64 cycles for 32 columns of W, and two things keep it waiting. Operands from L2 take longer than
// that, so a panel goes through in chunks of W that stay in L1, with the sums put down in between. And a tile's store
// holds up the products behind it until the tile is complete, so each tile is stored when the next block claims it.
#include "qmm_tables.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "qmm_avx512_panel.h"

namespace edger1 {
namespace {

constexpr int kTileRows = 32;
constexpr int kSlabRows = 512;      // rows of x whose sums scratch holds
constexpr int kChunkSteps = 9;      // steps of 32 columns of W, 2 KiB each, that pass before the next rows of x
constexpr int kUnpackColumns = 512; // columns of W that pass through bytes at a time

int64_t packed_bytes(const QuantMatrix& w, bool fast) {
  return fast ? static_cast<int64_t>(w.k) * kTileRows * 2 : packed_x_bytes(w, false);
}

inline __m512i to_bf16(__m512 first, __m512 second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
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
      int64_t{kSlabRows} * kPanel * 4;
}

// Two columns of W for 16 rows as the pairs of bf16 that a tile product takes.
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

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Not local: GCC 12 thinks that _tile_loadconfig reads eight bytes of it and may drop stores to the rest as dead.
const TileShapes kTileShapes;

// 32 rows of the result; `stride` in floats.
struct Block {
  float* at = nullptr;
  int64_t stride = 0;

  float* tile(int i) const {
    return at + i / 2 * 16 * stride + i % 2 * 16;
  }
};

// Tile I of the block before goes to its place and begins the next block. A macro: tile numbers are assembly text.
#define EDGER1_NEXT_BLOCK(I)                                    \
  if (before.at) {                                              \
    _tile_stored(I, before.tile(I), before.stride * 4);         \
  }                                                             \
  if (first) {                                                  \
    _tile_zero(I);                                              \
  } else {                                                      \
    _tile_loadd(I, sums.tile(I), sums.stride * 4);              \
  }

// Tiles 0..3 become the products of 32 rows of x and `steps` times 32 columns of W, plus `sums` unless these are the
// `first`; what they held goes to `before`, if anywhere.
inline void multiply(const uint16_t* x, const uint16_t* pairs, int steps, bool first, Block sums, Block before) {
  _tile_loadd(4, x, 64);
  _tile_loadd(6, pairs, 64);
  EDGER1_NEXT_BLOCK(0)
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, pairs + 512, 64);
  EDGER1_NEXT_BLOCK(1)
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, x + 512, 64);
  EDGER1_NEXT_BLOCK(2)
  _tile_dpbf16ps(2, 5, 6);
  EDGER1_NEXT_BLOCK(3)
  _tile_dpbf16ps(3, 5, 7);
  for (int i = 1; i < steps; i++) {
    x += 1024;
    pairs += 1024;
    _tile_loadd(4, x, 64);
    _tile_loadd(6, pairs, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, pairs + 512, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x + 512, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}
#undef EDGER1_NEXT_BLOCK

// A new result is in no cache, and the tile unit would wait for each of its lines.
inline void prefetch_block(Block block) {
  for (int i = 0; i < kTileRows; i++) {
    _mm_prefetch(block.at + i * block.stride, _MM_HINT_ET0);
    _mm_prefetch(block.at + i * block.stride + 16, _MM_HINT_ET0);
  }
}

// Up to kSlabRows rows against a whole panel. Blocks that the result has not room for end in `sums` and are copied.
void multiply_slab(const uint16_t* x, const uint16_t* pairs, int k, int rows, int columns, float* out, int64_t stride,
                   float* sums) {
  const int steps = k / 32, chunks = (steps + kChunkSteps - 1) / kChunkSteps, chunk = (steps + chunks - 1) / chunks;
  const int direct = columns == kPanel ? rows / kTileRows * kTileRows : 0;
  Block before;
  for (int step = 0; step < steps; step += chunk) {
    bool last = step + chunk >= steps;
    for (int i = 0; i < rows; i += kTileRows) {
      Block block{sums + i * kPanel, kPanel};
      if (last && i < direct) {
        prefetch_block(Block{out + i * stride, stride});
      }
      multiply(x + static_cast<int64_t>(i) * k + int64_t{step} * 1024, pairs + int64_t{step} * 1024,
               last ? steps - step : chunk, step == 0, block, before);
      before = last && i < direct ? Block{out + i * stride, stride} : block;
    }
  }
  _tile_stored(0, before.tile(0), before.stride * 4);
  _tile_stored(1, before.tile(1), before.stride * 4);
  _tile_stored(2, before.tile(2), before.stride * 4);
  _tile_stored(3, before.tile(3), before.stride * 4);
  __mmask16 low = first16(columns), high = first16(columns > 16 ? columns - 16 : 0);
  for (int i = direct; i < rows; i++) {
    _mm512_mask_storeu_ps(out + i * stride, low, _mm512_load_ps(sums + i * kPanel));
    _mm512_mask_storeu_ps(out + i * stride + 16, high, _mm512_load_ps(sums + i * kPanel + 16));
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
  for (int i = 0; i < m; i += kSlabRows) {
    multiply_slab(static_cast<const uint16_t*>(packed_x) + static_cast<int64_t>(i) * w.k, pairs, w.k,
                  m - i < kSlabRows ? m - i : kSlabRows, n1 - n0, out + i * stride, stride, sums);
  }
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
