// The large path with AVX-512: panels of 32 columns of the result, tiles of 6 (int8) or 12 (f32) rows of x.
//
// A panel's weights are unpacked once into thread scratch in the order the tiles read them, [step][32 columns], and serve
// every tile. x is packed too, [step][rows of the tile]: rows apart by a power of two would evict each other from L1.
#pragma once

#include "qmm_avx512_common.h"

namespace edger1 {
namespace {

constexpr int kTileFast = 6;
constexpr int kTileExact = 12;
constexpr int kExactColumns = 256; // columns of W that the exact path unpacks to f32 at a time

inline void transpose16(__m512i r[16]) {
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
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Codes of rows n0..n1 and columns k0..k1 (multiples of 32) as [column / 4][32 rows][4] bytes; missing rows are zero.
template <class F>
void unpack_codes(const QuantMatrix& w, int n0, int n1, int k0, int k1, uint8_t* panel) {
  const Decoder<F> decode;
  for (int half = 0; half < 2; half++) {
    int first = n0 + 16 * half;
    for (int k = k0; k < k1; k += 64) {
      int columns = k1 - k < 64 ? k1 - k : 64;
      __mmask64 bytes = first64(columns * F::bits / 8);
      __m512i rows[16];
      for (int i = 0; i < 16; i++) {
        rows[i] = first + i < n1 ? decode(codes_row(w, first + i) + static_cast<int64_t>(k) * F::bits / 8, bytes)
                                 : _mm512_setzero_si512();
      }
      transpose16(rows);
      for (int i = 0; i < columns / 4; i++) {
        _mm512_store_si512(panel + (static_cast<int64_t>(k - k0) / 4 + i) * 128 + 64 * half, rows[i]);
      }
    }
  }
}

// Scales and biases of rows n0..n1 as [group][32 rows].
inline void unpack_scales(const QuantMatrix& w, int n0, int n1, float* scales, float* biases) {
  int groups = w.k / w.group;
  for (int half = 0; half < 2; half++) {
    for (int g = 0; g < groups; g += 16) {
      int count = groups - g < 16 ? groups - g : 16;
      __m512i s[16], b[16];
      for (int i = 0; i < 16; i++) {
        int n = n0 + 16 * half + i;
        bool real = n < n1;
        s[i] = real ? _mm512_castps_si512(load_scales(scales_row(w, n), w.type, g, first16(count)))
                    : _mm512_setzero_si512();
        b[i] = real ? _mm512_castps_si512(load_biases(w, scales_row(w, n), biases_row(w, n), g, first16(count)))
                    : _mm512_setzero_si512();
      }
      transpose16(s);
      transpose16(b);
      for (int i = 0; i < count; i++) {
        _mm512_store_si512(scales + (g + i) * 32 + 16 * half, s[i]);
        _mm512_store_si512(biases + (g + i) * 32 + 16 * half, b[i]);
      }
    }
  }
}

struct PackedFast {
  int64_t scales, sums, outliers, bytes;
  explicit PackedFast(const QuantMatrix& w) {
    scales = static_cast<int64_t>(w.k) * kTileFast;
    sums = scales + static_cast<int64_t>(w.k) / kBlock * kTileFast * 4;
    outliers = sums + static_cast<int64_t>(w.k) / w.group * kTileFast * 4;
    bytes = padded(outliers + kOutliers * kTileFast * 4, 64);
  }
};

int64_t packed_x_bytes(const QuantMatrix& w, bool fast) {
  return fast ? PackedFast(w).bytes : static_cast<int64_t>(w.k) * kTileExact * 4;
}

int64_t packed_f32_bytes(int n) {
  return static_cast<int64_t>(n) * kTileExact * 4;
}

// 32 elements of x from k on, the outliers among them zero; `next` is the first outlier not yet met, and they rise.
inline const float* without_outliers(const float* x, int k, const int*& next, const int* end, float* buffer) {
  if (next == end || *next >= k + kBlock) {
    return x + k;
  }
  _mm512_storeu_ps(buffer, _mm512_loadu_ps(x + k));
  _mm512_storeu_ps(buffer + 16, _mm512_loadu_ps(x + k + 16));
  for (; next != end && *next < k + kBlock; next++) {
    buffer[*next - k] = 0.0f;
  }
  return buffer;
}

void pack_x_fast(const QuantMatrix& w, const float* const* x, int count, const int* outliers, void* packed) {
  PackedFast at(w);
  auto* kept = reinterpret_cast<float*>(static_cast<char*>(packed) + at.outliers);
  for (int j = 0; j < kOutliers; j++) {
    for (int i = 0; i < kTileFast; i++) {
      kept[j * kTileFast + i] = i < count ? x[i][outliers[j]] : 0.0f;
    }
  }
  const int* next[kTileFast];
  for (auto& one : next) {
    one = outliers;
  }
  auto* words = static_cast<int32_t*>(packed);
  auto* scales = reinterpret_cast<float*>(static_cast<char*>(packed) + at.scales);
  auto* sums = reinterpret_cast<float*>(static_cast<char*>(packed) + at.sums);
  int per = w.group / kBlock;
  for (int b = 0; b < w.k / kBlock; b++) {
    alignas(32) int32_t q[kTileFast][8];
    for (int i = 0; i < kTileFast; i++) {
      __m256i codes = _mm256_setzero_si256();
      int sum = 0;
      float scale = 0.0f;
      if (i < count) {
        float buffer[kBlock];
        scale = quantize_block(without_outliers(x[i], b * kBlock, next[i], outliers + kOutliers, buffer), codes, sum);
      }
      _mm256_store_si256(reinterpret_cast<__m256i*>(q[i]), codes);
      scales[b * kTileFast + i] = scale;
      float& total = sums[b / per * kTileFast + i];
      total = (b % per == 0 ? 0.0f : total) + scale * static_cast<float>(sum);
    }
    for (int j = 0; j < 8; j++) {
      for (int i = 0; i < kTileFast; i++) {
        words[(b * 8 + j) * kTileFast + i] = q[i][j];
      }
    }
  }
}

void pack_x_f32(int n, const float* const* x, int count, void* packed) {
  auto* to = static_cast<float*>(packed);
  int j = 0;
  for (; j + 16 <= n; j += 16) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) {
      r[i] = i < count ? _mm512_loadu_si512(x[i] + j) : _mm512_setzero_si512();
    }
    transpose16(r);
    for (int i = 0; i < 16; i++) {
      _mm512_mask_storeu_epi32(to + static_cast<int64_t>(j + i) * kTileExact, (1u << kTileExact) - 1, r[i]);
    }
  }
  for (; j < n; j++) {
    for (int i = 0; i < kTileExact; i++) {
      to[static_cast<int64_t>(j) * kTileExact + i] = i < count ? x[i][j] : 0.0f;
    }
  }
}

void pack_x_exact(const QuantMatrix& w, const float* const* x, int count, void* packed) {
  pack_x_f32(w.k, x, count, packed);
}

// The weights of the outliers as [outlier][32 columns], from an unpacked panel.
inline void outlier_weights(const uint8_t* panel, const float* scales, const float* biases, int group,
                            const int* outliers, float* weights) {
  for (int j = 0; j < kOutliers; j++) {
    int c = outliers[j];
    __m512i shift = _mm512_set1_epi32(8 * (c % 4));
    for (int i = 0; i < 32; i += 16) {
      __m512i code = _mm512_and_si512(_mm512_srlv_epi32(_mm512_load_si512(panel + c / 4 * 128 + 4 * i), shift),
                                      _mm512_set1_epi32(255));
      _mm512_store_ps(weights + j * 32 + i,
                      _mm512_fmadd_ps(_mm512_load_ps(scales + c / group * 32 + i), _mm512_cvtepi32_ps(code),
                                      _mm512_load_ps(biases + c / group * 32 + i)));
    }
  }
}

// One tile: 6 rows of x, 32 columns, all of K. Sums of a block's products are exact in int32.
inline void tile_fast(const uint8_t* panel, const float* scales, const float* biases, const float* weights,
                      const void* packed, int k, int group, const PackedFast& at, int rows, int columns, float* out,
                      int64_t stride) {
  const auto* words = static_cast<const int32_t*>(packed);
  const auto* x_scales = reinterpret_cast<const float*>(static_cast<const char*>(packed) + at.scales);
  const auto* x_sums = reinterpret_cast<const float*>(static_cast<const char*>(packed) + at.sums);
  __m512 total[kTileFast][2];
#pragma GCC unroll 6
  for (int m = 0; m < kTileFast; m++) {
    total[m][0] = total[m][1] = _mm512_setzero_ps();
  }
  const auto* x_kept = reinterpret_cast<const float*>(static_cast<const char*>(packed) + at.outliers);
  for (int j = 0; j < kOutliers; j++) {
    __m512 w0 = _mm512_load_ps(weights + j * 32), w1 = _mm512_load_ps(weights + j * 32 + 16);
#pragma GCC unroll 6
    for (int m = 0; m < kTileFast; m++) {
      __m512 x = _mm512_set1_ps(x_kept[j * kTileFast + m]);
      total[m][0] = _mm512_fmadd_ps(w0, x, total[m][0]);
      total[m][1] = _mm512_fmadd_ps(w1, x, total[m][1]);
    }
  }
  for (int g = 0; g < k / group; g++) {
    for (int b = 0; b < group / kBlock; b++) {
      __m512i sum[kTileFast][2];
#pragma GCC unroll 6
      for (int m = 0; m < kTileFast; m++) {
        sum[m][0] = sum[m][1] = _mm512_setzero_si512();
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        __m512i w0 = _mm512_load_si512(panel + j * 128), w1 = _mm512_load_si512(panel + j * 128 + 64);
#pragma GCC unroll 6
        for (int m = 0; m < kTileFast; m++) {
          __m512i x = _mm512_set1_epi32(words[j * kTileFast + m]);
          sum[m][0] = _mm512_dpbusd_epi32(sum[m][0], w0, x);
          sum[m][1] = _mm512_dpbusd_epi32(sum[m][1], w1, x);
        }
      }
      __m512 s0 = _mm512_load_ps(scales), s1 = _mm512_load_ps(scales + 16);
#pragma GCC unroll 6
      for (int m = 0; m < kTileFast; m++) {
        __m512 x = _mm512_set1_ps(x_scales[m]);
        total[m][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][0]), _mm512_mul_ps(s0, x), total[m][0]);
        total[m][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][1]), _mm512_mul_ps(s1, x), total[m][1]);
      }
      panel += 1024;
      words += 8 * kTileFast;
      x_scales += kTileFast;
    }
    __m512 b0 = _mm512_load_ps(biases), b1 = _mm512_load_ps(biases + 16);
#pragma GCC unroll 6
    for (int m = 0; m < kTileFast; m++) {
      __m512 x = _mm512_set1_ps(x_sums[m]);
      total[m][0] = _mm512_fmadd_ps(b0, x, total[m][0]);
      total[m][1] = _mm512_fmadd_ps(b1, x, total[m][1]);
    }
    scales += 32;
    biases += 32;
    x_sums += kTileFast;
  }
  for (int m = 0; m < rows; m++) {
    _mm512_mask_storeu_ps(out + m * stride, first16(columns), total[m][0]);
    _mm512_mask_storeu_ps(out + m * stride + 16, first16(columns - 16 > 0 ? columns - 16 : 0), total[m][1]);
  }
}

// One tile of a plain product: 12 rows of x against a panel of `steps` by 32 floats, added to `out` if asked.
inline void tile_f32(const float* panel, const float* x, int steps, bool add, int rows, int columns, float* out,
                     int64_t stride) {
  __mmask16 mask0 = first16(columns), mask1 = first16(columns - 16 > 0 ? columns - 16 : 0);
  __m512 total[kTileExact][2];
#pragma GCC unroll 12
  for (int m = 0; m < kTileExact; m++) {
    bool load = add && m < rows;
    total[m][0] = _mm512_maskz_loadu_ps(load ? mask0 : __mmask16{0}, out + m * stride);
    total[m][1] = _mm512_maskz_loadu_ps(load ? mask1 : __mmask16{0}, out + m * stride + 16);
  }
  for (int i = 0; i < steps; i++) {
    __m512 w0 = _mm512_load_ps(panel), w1 = _mm512_load_ps(panel + 16);
#pragma GCC unroll 12
    for (int m = 0; m < kTileExact; m++) {
      __m512 value = _mm512_set1_ps(x[m]);
      total[m][0] = _mm512_fmadd_ps(w0, value, total[m][0]);
      total[m][1] = _mm512_fmadd_ps(w1, value, total[m][1]);
    }
    panel += 32;
    x += kTileExact;
  }
#pragma GCC unroll 12
  for (int m = 0; m < kTileExact; m++) {
    if (m < rows) {
      _mm512_mask_storeu_ps(out + m * stride, mask0, total[m][0]);
      _mm512_mask_storeu_ps(out + m * stride + 16, mask1, total[m][1]);
    }
  }
}

int64_t panel_scratch_bytes(const QuantMatrix& w, bool fast) {
  int64_t scales = 2 * static_cast<int64_t>(w.k / w.group) * 32 * 4;
  return scales + (fast ? static_cast<int64_t>(w.k) * 32 + kOutliers * 32 * 4 : int64_t{kExactColumns} * 32 * 5);
}

void panel_fast(const QuantMatrix& w, const void* packed_x, int m, int n0, int n1, float* out, int64_t stride,
                const int* outliers, void* scratch) {
  auto* scales = static_cast<float*>(scratch);
  float* biases = scales + w.k / w.group * 32;
  float* weights = biases + w.k / w.group * 32;
  auto* panel = reinterpret_cast<uint8_t*>(weights + kOutliers * 32);
  unpack_scales(w, n0, n1, scales, biases);
  for_format(w, [&](auto format) { unpack_codes<decltype(format)>(w, n0, n1, 0, w.k, panel); });
  outlier_weights(panel, scales, biases, w.group, outliers, weights);
  PackedFast at(w);
  for (int i = 0; i < m; i += kTileFast) {
    tile_fast(panel, scales, biases, weights, static_cast<const char*>(packed_x) + i / kTileFast * at.bytes, w.k,
              w.group, at, m - i < kTileFast ? m - i : kTileFast, n1 - n0, out + i * stride, stride);
  }
}

void panel_exact(const QuantMatrix& w, const void* packed_x, int m, int n0, int n1, float* out, int64_t stride,
                 void* scratch) {
  auto* scales = static_cast<float*>(scratch);
  float* biases = scales + w.k / w.group * 32;
  float* panel = biases + w.k / w.group * 32;
  auto* codes = reinterpret_cast<uint8_t*>(panel + kExactColumns * 32);
  unpack_scales(w, n0, n1, scales, biases);
  for (int k0 = 0; k0 < w.k; k0 += kExactColumns) {
    int k1 = k0 + kExactColumns < w.k ? k0 + kExactColumns : w.k;
    for_format(w, [&](auto format) { unpack_codes<decltype(format)>(w, n0, n1, k0, k1, codes); });
    for (int k = k0; k < k1; k += 4) {
      const float* s = scales + k / w.group * 32;
      const float* b = biases + k / w.group * 32;
      for (int half = 0; half < 2; half++) {
        __m512i four = _mm512_load_si512(codes + (k - k0) * 32 + 64 * half);
        __m512 scale = _mm512_load_ps(s + 16 * half), bias = _mm512_load_ps(b + 16 * half);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          __m512i code = _mm512_and_si512(_mm512_srli_epi32(four, static_cast<unsigned>(8 * i)), _mm512_set1_epi32(255));
          _mm512_store_ps(panel + (k - k0 + i) * 32 + 16 * half,
                          _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(code), bias));
        }
      }
    }
    for (int i = 0; i < m; i += kTileExact) {
      const float* x = static_cast<const float*>(packed_x) + (static_cast<int64_t>(i) * w.k + int64_t{k0} * kTileExact);
      tile_f32(panel, x, k1 - k0, k0 != 0, m - i < kTileExact ? m - i : kTileExact, n1 - n0, out + i * stride, stride);
    }
  }
}

int64_t back_scratch_bytes(const QuantMatrix&) {
  return int64_t{kExactColumns} * 32 * 4;
}

void panel_back(const QuantMatrix& w, const void* packed_x, int m, int k0, int k1, float* out, int64_t stride,
                void* scratch) {
  auto* panel = static_cast<float*>(scratch);
  int g = k0 / w.group;
  for (int n0 = 0; n0 < w.n; n0 += kExactColumns) {
    int n1 = n0 + kExactColumns < w.n ? n0 + kExactColumns : w.n;
    for_format(w, [&](auto format) {
      using F = decltype(format);
      const Decoder<F> decode;
      for (int n = n0; n < n1; n++) {
        alignas(64) uint8_t code[64];
        _mm512_store_si512(code, decode(codes_row(w, n) + static_cast<int64_t>(k0) * F::bits / 8, first64(4 * F::bits)));
        __m512 scale = _mm512_broadcastss_ps(_mm512_castps512_ps128(load_scales(scales_row(w, n), w.type, g, 1)));
        __m512 bias =
            _mm512_broadcastss_ps(_mm512_castps512_ps128(load_biases(w, scales_row(w, n), biases_row(w, n), g, 1)));
        for (int half = 0; half < 2; half++) {
          __m512i wide = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(code + 16 * half)));
          _mm512_store_ps(panel + (n - n0) * 32 + 16 * half, _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(wide), bias));
        }
      }
    });
    for (int i = 0; i < m; i += kTileExact) {
      const float* x = static_cast<const float*>(packed_x) + (static_cast<int64_t>(i) * w.n + int64_t{n0} * kTileExact);
      tile_f32(panel, x, n1 - n0, n0 != 0, m - i < kTileExact ? m - i : kTileExact, k1 - k0, out + i * stride, stride);
    }
  }
}

} // namespace
} // namespace edger1
