// A panel of 32 rows of a quantized W in bf16, and its products with rows of x in matrix tiles (AMX). Included by sources
// compiled for them only; everything is in an anonymous namespace, as in amx_tiles.h.
//
// What keeps the tile unit waiting is the way to its operands. W goes through in chunks that stay in L1; rows of x come
// from L2 by loads that do not displace them. A tile's store holds up the products behind it until the tile is complete,
// and the lines of a large result are in no cache: sums go to a small dense block, which is used up while the tiles of
// the next one are at work.
#pragma once

#include "amx_tiles.h"
#include "qmm_avx512_panel.h"

namespace edger1 {
namespace {

constexpr int kUnpackColumns = 512; // columns of W that pass through bytes at a time

constexpr int kChunkSteps = 18;     // steps of 32 columns of W, 2 KiB each, that stay in L1
constexpr int kSlabRows = 512;      // rows of x whose sums wait for the next chunk

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

class TilePanel {
 public:
  static int64_t scratch_bytes(const QuantMatrix& w) {
    return 2 * int64_t{w.k / w.group} * 32 * 4 + int64_t{w.k} * 64 + int64_t{kUnpackColumns} * 32 +
        (2 * kTileRows + (w.k > kChunkSteps * 32 ? kSlabRows : 0)) * int64_t{kPanel} * 4;
  }

  // Unpacks rows [n0, n1) of W, n1 <= n0 + 32.
  TilePanel(const QuantMatrix& w, int n0, int n1, void* scratch) : k_(w.k) {
    auto* scales = static_cast<float*>(scratch);
    float* biases = scales + w.k / w.group * 32;
    pairs_ = reinterpret_cast<uint16_t*>(biases + w.k / w.group * 32);
    auto* codes = reinterpret_cast<uint8_t*>(pairs_ + int64_t{w.k} * 32);
    blocks_ = reinterpret_cast<float*>(codes + kUnpackColumns * 32);
    unpack_scales(w, n0, n1, scales, biases);
    for_format(w, [&](auto format) {
      using F = decltype(format);
      if constexpr (F::bits == 4) {
        unpack_pairs_nibbles<F>(w, n0, n1, scales, biases, pairs_);
      } else {
        unpack_pairs<F>(w, n0, n1, scales, biases, pairs_, codes);
      }
    });
  }

  // Calls use(row, count, sums) with the products of rows row .. row + count - 1 <= row + 31 and the panel, as [32][32]
  // floats, for all m packed rows; expect(row) comes a while before, to ask for memory that use() will need.
  template <class Use, class Expect>
  void multiply(const void* packed_x, int m, Use&& use, Expect&& expect) const {
    // GCC 12 does not know that tile loads read memory: what was unpacked shall be there.
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&kTileShapes);
    const auto* x = static_cast<const uint16_t*>(packed_x);
    for (int slab = 0; slab < m; slab += kSlabRows) {
      multiply_slab(x + int64_t{slab} * k_, m - slab < kSlabRows ? m - slab : kSlabRows, slab, use, expect);
    }
    _tile_release();
  }

 private:
  static constexpr int kBlock = kTileRows * kPanel;

  template <class Use, class Expect>
  void multiply_slab(const uint16_t* x, int rows, int first, Use& use, Expect& expect) const {
    const int steps = k_ / 32, chunks = (steps + kChunkSteps - 1) / kChunkSteps, chunk = (steps + chunks - 1) / chunks;
    float* waiting = blocks_ + 2 * kBlock;
    int step = 0;
    for (; step + chunk < steps; step += chunk) {
      for (int i = 0; i < rows; i += kTileRows) {
        start_sums(step, waiting + i * kPanel);
        add_products(x + int64_t{i} * k_ + int64_t{step} * 1024, pairs_ + int64_t{step} * 1024, chunk);
        store_sums(waiting + i * kPanel, kPanel);
      }
    }
    for (int i = 0, turn = 0; i < rows; i += kTileRows, turn ^= 1) {
      expect(first + i);
      start_sums(step, waiting + i * kPanel);
      add_products(x + int64_t{i} * k_ + int64_t{step} * 1024, pairs_ + int64_t{step} * 1024, steps - step);
      if (i > 0) {
        use(first + i - kTileRows, kTileRows, blocks_ + (turn ^ 1) * kBlock);
      }
      store_sums(blocks_ + turn * kBlock, kPanel);
      __asm__ volatile("" ::: "memory");
    }
    int last = (rows - 1) / kTileRows;
    use(first + last * kTileRows, rows - last * kTileRows, blocks_ + (last & 1) * kBlock);
  }

  static void start_sums(int step, const float* sums) {
    if (step == 0) {
      zero_sums();
    } else {
      load_sums(sums, kPanel);
    }
  }

  int k_;
  uint16_t* pairs_;
  float* blocks_;
};

} // namespace
} // namespace edger1
