// The quantized matmul's inner loops over vectors of 8, for every instruction set but AVX-512.
//
// A source includes this after it has defined, in edger1's anonymous namespace and with the types of qmm_vector.h:
//   b32 decode32<F>(const uint8_t*)                       32 codes in order (mxfp4 as T[code])
//   i8 dot32<F>(b32 codes, const int8_t* x)               products of 32, each four in a row added up
//   block_dot<F>(const uint8_t* panel, const int8_t* x, i8 (*sum)[2])    see fast tile below
//   f8 fma8(f8 a, f8 b, f8 c), f8 expand8(const uint8_t*), void convert(from, type, count, float* to)
// Everything is in the anonymous namespace, so that no copy of it can stand in for another instruction set's.
#pragma once

#include "qmm_vector.h"

namespace edger1 {
namespace {

// Scales and biases of one row as floats in a buffer, groups padded with zeros to a multiple of 8.
inline void row_scales(const QuantMatrix& w, int64_t n, float* scales, float* biases) {
  int groups = w.k / w.group;
  convert(static_cast<const char*>(w.scales) + n * w.scale_stride, w.type, groups, scales);
  if (w.fp4) {
    for (int g = 0; g < groups; g++) {
      scales[g] *= 0.5f;
      biases[g] = scales[g] * -12.0f;
    }
  } else {
    convert(static_cast<const char*>(w.biases) + n * w.bias_stride, w.type, groups, biases);
  }
  for (int g = groups; g % 8 != 0; g++) {
    scales[g] = biases[g] = 0.0f;
  }
}

inline const float* part(const void* prepared, int64_t offset) {
  return reinterpret_cast<const float*>(static_cast<const char*>(prepared) + offset);
}

inline float add_up(f8 v) {
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

constexpr int kScaleBuffer = 1024; // groups of one row that fit on the stack at a time

template <class F, int M, bool Fast>
void rows_block(const QuantMatrix& w, const void* const* prepared, int n0, int n1, float* const* out) {
  const PreparedLayout layout = prepared_layout(w.k, Fast);
  const int per = w.group / kBlock, groups = w.k / w.group;
  alignas(32) float scales[kScaleBuffer], biases[kScaleBuffer];
  for (int n = n0; n < n1; n++) {
    const uint8_t* codes = w.codes + n * w.row_bytes;
    f8 total[M];
    for (int m = 0; m < M; m++) {
      total[m] = f8{};
    }
    for (int g0 = 0; g0 < groups; g0 += kScaleBuffer) {
      int here = groups - g0 < kScaleBuffer ? groups - g0 : kScaleBuffer;
      QuantMatrix piece = w;
      piece.k = here * w.group;
      auto skip = static_cast<int64_t>(g0) * (w.type == ScaleType::f32 ? 4 : w.type == ScaleType::e8m0 ? 1 : 2);
      piece.scales = static_cast<const char*>(w.scales) + skip;
      piece.biases = w.fp4 ? nullptr : static_cast<const char*>(w.biases) + skip;
      row_scales(piece, n, scales, biases);
      for (int g = 0; g < here; g += 8) {
        f8 bias = load8(biases + g);
        for (int m = 0; m < M; m++) {
          total[m] = fma8(bias, load8(part(prepared[m], layout.sums) + g0 + g), total[m]);
        }
      }
      for (int g = 0; g < here; g++) {
        for (int b = (g0 + g) * per; b < (g0 + g + 1) * per; b++) {
          b32 block = decode32<F>(codes + static_cast<int64_t>(b) * 4 * F::bits);
          int64_t at = static_cast<int64_t>(b) * kBlock;
          if constexpr (Fast) {
            for (int m = 0; m < M; m++) {
              f8 sum = to_f8(dot32<F>(block, static_cast<const int8_t*>(prepared[m]) + at));
              f8 factor = set8(scales[g]) * load8(part(prepared[m], layout.scales) + b * 8);
              total[m] = fma8(sum, factor, total[m]);
            }
          } else {
            f8 scale = set8(scales[g]);
            alignas(32) uint8_t code[32];
            store32(code, block);
            for (int i = 0; i < 4; i++) {
              f8 value = expand8(code + 8 * i) * scale;
              for (int m = 0; m < M; m++) {
                total[m] = fma8(value, load8(static_cast<const float*>(prepared[m]) + at + 8 * i), total[m]);
              }
            }
          }
        }
      }
    }
    for (int m = 0; m < M; m++) {
      out[m][n - n0] = add_up(total[m]);
    }
  }
}

// Rows of x in blocks of 4, 2 or 1; a block that is not full computes its first row more than once.
template <bool Fast>
void rows(const QuantMatrix& w, const void* const* prepared, int m, int n0, int n1, float* const* out) {
  for_format(w, [&](auto format) {
    using F = decltype(format);
    for (int done = 0; done < m;) {
      int left = m - done;
      int size = left > 2 ? 4 : left;
      const void* x[4];
      float* to[4];
      for (int i = 0; i < size; i++) {
        x[i] = prepared[i < left ? done + i : done];
        to[i] = out[i < left ? done + i : done];
      }
      size == 4 ? rows_block<F, 4, Fast>(w, x, n0, n1, to)
          : size == 2 ? rows_block<F, 2, Fast>(w, x, n0, n1, to)
                      : rows_block<F, 1, Fast>(w, x, n0, n1, to);
      done += size;
    }
  });
}

// q = round(x / scale), ties to even, with scale = max |x| / 127; what is not finite makes the scale NaN, so that it shows.
template <int Count>
inline float quantize(const float* x, int8_t* q, int& sum) {
  float amax = 0.0f;
  bool finite = true;
  for (int i = 0; i < Count; i++) {
    float a = __builtin_fabsf(x[i]);
    finite &= a < __builtin_inff();
    amax = a > amax ? a : amax;
  }
  if (!finite) {
    for (int i = 0; i < Count; i++) {
      q[i] = 0;
    }
    sum = 0;
    return __builtin_nanf("");
  }
  float inverse = amax > 0 ? 127.0f / amax : 0.0f;
  sum = 0;
  for (int i = 0; i < Count; i++) {
    int value = __builtin_irintf(x[i] * inverse);
    q[i] = static_cast<int8_t>(value);
    sum += value;
  }
  return amax / 127.0f;
}

void prepare_fast(const QuantMatrix& w, const float* x, void* prepared) {
  PreparedLayout layout = prepared_layout(w.k, true);
  __builtin_memset(prepared, 0, static_cast<size_t>(layout.bytes));
  auto* scales = const_cast<float*>(part(prepared, layout.scales));
  auto* sums = const_cast<float*>(part(prepared, layout.sums));
  for (int i = 0; i < w.k; i += kScaled) {
    int sum;
    float scale = quantize<kScaled>(x + i, static_cast<int8_t*>(prepared) + i, sum);
    scales[i / 4] = scales[i / 4 + 1] = scale; // a lane of dot32 adds up four elements
    sums[i / w.group] += scale * static_cast<float>(sum);
  }
}

void prepare_exact(const QuantMatrix& w, const float* x, void* prepared) {
  PreparedLayout layout = prepared_layout(w.k, false);
  __builtin_memset(prepared, 0, static_cast<size_t>(layout.bytes));
  __builtin_memcpy(prepared, x, static_cast<size_t>(w.k) * 4);
  auto* sums = const_cast<float*>(part(prepared, layout.sums));
  for (int g = 0; g < w.k / w.group; g++) {
    f8 total{};
    for (int i = 0; i < w.group; i += 8) {
      total += load8(x + int64_t{g} * w.group + i);
    }
    sums[g] = add_up(total);
  }
}

// The large path, as with AVX-512: [step][32 columns] panels, [step][rows] tiles; columns in halves of 16.
constexpr int kTileFast = 4;
constexpr int kTileExact = 6;
constexpr int kExactColumns = 256;

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

void pack_x_fast(const QuantMatrix& w, const float* const* x, int count, const int* outliers, void* packed) {
  PackedFast at(w);
  auto* kept = const_cast<float*>(part(packed, at.outliers));
  for (int j = 0; j < kOutliers; j++) {
    for (int i = 0; i < kTileFast; i++) {
      kept[j * kTileFast + i] = i < count ? x[i][outliers[j]] : 0.0f;
    }
  }
  int next = 0; // the first outlier that lies in this block or behind it
  auto* bytes = static_cast<int8_t*>(packed);
  auto* scales = const_cast<float*>(part(packed, at.scales));
  auto* sums = const_cast<float*>(part(packed, at.sums));
  int per = w.group / kBlock;
  for (int b = 0; b < w.k / kBlock; b++) {
    for (int i = 0; i < kTileFast; i++) {
      alignas(32) int8_t q[kBlock] = {};
      int sum = 0;
      float scale = 0.0f;
      if (i < count) {
        float values[kBlock];
        __builtin_memcpy(values, x[i] + int64_t{b} * kBlock, sizeof values);
        for (int j = next; j < kOutliers && outliers[j] < (b + 1) * kBlock; j++) {
          values[outliers[j] - b * kBlock] = 0.0f;
        }
        scale = quantize<kBlock>(values, q, sum);
      }
      scales[b * kTileFast + i] = scale;
      float& total = sums[b / per * kTileFast + i];
      total = (b % per == 0 ? 0.0f : total) + scale * static_cast<float>(sum);
      for (int j = 0; j < 8; j++) {
        __builtin_memcpy(bytes + ((int64_t{b} * 8 + j) * kTileFast + i) * 4, q + 4 * j, 4);
      }
    }
    while (next < kOutliers && outliers[next] < (b + 1) * kBlock) {
      next++;
    }
  }
}

void pack_x_f32(int n, const float* const* x, int count, void* packed) {
  auto* to = static_cast<float*>(packed);
  for (int j = 0; j < n; j++) {
    for (int i = 0; i < kTileExact; i++) {
      to[int64_t{j} * kTileExact + i] = i < count ? x[i][j] : 0.0f;
    }
  }
}

void pack_x_exact(const QuantMatrix& w, const float* const* x, int count, void* packed) {
  pack_x_f32(w.k, x, count, packed);
}

template <class F>
void unpack_codes(const QuantMatrix& w, int n0, int n1, int k0, int k1, uint8_t* panel) {
  for (int i = 0; i < kPanel; i++) {
    for (int k = k0; k < k1; k += kBlock) {
      alignas(32) uint8_t code[32] = {};
      if (n0 + i < n1) {
        store32(code, decode32<F>(w.codes + (n0 + i) * w.row_bytes + static_cast<int64_t>(k) * F::bits / 8));
      }
      for (int j = 0; j < 8; j++) {
        __builtin_memcpy(panel + (static_cast<int64_t>(k - k0) / 4 + j) * 128 + 4 * i, code + 4 * j, 4);
      }
    }
  }
}

void unpack_scales(const QuantMatrix& w, int n0, int n1, float* scales, float* biases, float* row) {
  int groups = w.k / w.group;
  float* row_biases = row + padded(groups, 8);
  for (int i = 0; i < kPanel; i++) {
    if (n0 + i < n1) {
      row_scales(w, n0 + i, row, row_biases);
    }
    for (int g = 0; g < groups; g++) {
      scales[int64_t{g} * 32 + i] = n0 + i < n1 ? row[g] : 0.0f;
      biases[int64_t{g} * 32 + i] = n0 + i < n1 ? row_biases[g] : 0.0f;
    }
  }
}

int64_t panel_scratch_bytes(const QuantMatrix& w, bool fast) {
  int64_t groups = w.k / w.group;
  return 2 * groups * 32 * 4 + 2 * padded(groups, 8) * 4 +
      (fast ? static_cast<int64_t>(w.k) * 32 + kOutliers * 32 * 4 : int64_t{kExactColumns} * 32 * 5) + 64;
}

inline void store_part(f8 value, int columns, float* out) {
  if (columns >= 8) {
    store8(out, value);
  } else {
    for (int i = 0; i < columns; i++) {
      out[i] = value[i];
    }
  }
}

inline f8 load_part(int columns, const float* from) {
  if (columns >= 8) {
    return load8(from);
  }
  f8 value{};
  for (int i = 0; i < columns; i++) {
    value[i] = from[i];
  }
  return value;
}

template <class F>
void tile_fast(const uint8_t* panel, const float* scales, const float* biases, const float* weights,
               const void* packed, const QuantMatrix& w, const PackedFast& at, int rows, int columns, float* out, int64_t stride) {
  const auto* x = static_cast<const int8_t*>(packed);
  const float* x_scales = part(packed, at.scales);
  const float* x_sums = part(packed, at.sums);
  const float* x_kept = part(packed, at.outliers);
  f8 total[kTileFast][2] = {};
  for (int j = 0; j < kOutliers; j++) {
    for (int m = 0; m < kTileFast; m++) {
      f8 value = set8(x_kept[j * kTileFast + m]);
      total[m][0] = fma8(load8(weights + j * 32), value, total[m][0]);
      total[m][1] = fma8(load8(weights + j * 32 + 8), value, total[m][1]);
    }
  }
  for (int g = 0; g < w.k / w.group; g++) {
    f8 s[2] = {load8(scales + g * 32), load8(scales + g * 32 + 8)};
    f8 b[2] = {load8(biases + g * 32), load8(biases + g * 32 + 8)};
    for (int i = 0; i < w.group / kBlock; i++) {
      i8 sum[kTileFast][2];
      block_dot<F>(panel, x, sum);
      for (int m = 0; m < kTileFast; m++) {
        f8 scale = set8(x_scales[m]);
        total[m][0] = fma8(to_f8(sum[m][0]), s[0] * scale, total[m][0]);
        total[m][1] = fma8(to_f8(sum[m][1]), s[1] * scale, total[m][1]);
      }
      panel += 1024;
      x += 32 * kTileFast;
      x_scales += kTileFast;
    }
    for (int m = 0; m < kTileFast; m++) {
      total[m][0] = fma8(b[0], set8(x_sums[m]), total[m][0]);
      total[m][1] = fma8(b[1], set8(x_sums[m]), total[m][1]);
    }
    x_sums += kTileFast;
  }
  for (int m = 0; m < rows; m++) {
    store_part(total[m][0], columns, out + m * stride);
    store_part(total[m][1], columns - 8, out + m * stride + 8);
  }
}

inline void tile_f32(const float* panel, const float* x, int steps, bool add, int rows, int columns, float* out,
                     int64_t stride) {
  f8 total[kTileExact][2];
  for (int m = 0; m < kTileExact; m++) {
    total[m][0] = add && m < rows ? load_part(columns, out + m * stride) : f8{};
    total[m][1] = add && m < rows ? load_part(columns - 8, out + m * stride + 8) : f8{};
  }
  for (int i = 0; i < steps; i++) {
    f8 w0 = load8(panel), w1 = load8(panel + 8);
#pragma GCC unroll 6
    for (int m = 0; m < kTileExact; m++) {
      f8 value = set8(x[m]);
      total[m][0] = fma8(w0, value, total[m][0]);
      total[m][1] = fma8(w1, value, total[m][1]);
    }
    panel += 32;
    x += kTileExact;
  }
  for (int m = 0; m < rows; m++) {
    store_part(total[m][0], columns, out + m * stride);
    store_part(total[m][1], columns - 8, out + m * stride + 8);
  }
}

void panel_fast(const QuantMatrix& w, const void* packed_x, int m, int n0, int n1, float* out, int64_t stride,
                const int* outliers, void* scratch) {
  int64_t groups = w.k / w.group;
  auto* panel = static_cast<uint8_t*>(scratch);
  auto* weights = reinterpret_cast<float*>(panel + int64_t{w.k} * 32);
  float* scales = weights + kOutliers * 32;
  float* biases = scales + groups * 32;
  unpack_scales(w, n0, n1, scales, biases, biases + groups * 32);
  PackedFast at(w);
  for_format(w, [&](auto format) {
    using F = decltype(format);
    unpack_codes<F>(w, n0, n1, 0, w.k, panel);
    for (int j = 0; j < kOutliers; j++) {
      int c = outliers[j], g = c / w.group * 32;
      for (int i = 0; i < 32; i++) {
        weights[j * 32 + i] = scales[g + i] * static_cast<float>(panel[c / 4 * 128 + 4 * i + c % 4]) + biases[g + i];
      }
    }
    for (int i = 0; i < m; i += kTileFast) {
      for (int c = 0; c < n1 - n0; c += 16) {
        tile_fast<F>(panel + 4 * c, scales + c, biases + c, weights + c,
                     static_cast<const char*>(packed_x) + i / kTileFast * at.bytes, w, at,
                     m - i < kTileFast ? m - i : kTileFast, n1 - n0 - c, out + i * stride + c, stride);
      }
    }
  });
}

void tiles_f32(const float* panel, const void* packed_x, int64_t depth, int from, int to, int m, int columns,
               float* out, int64_t stride) {
  for (int i = 0; i < m; i += kTileExact) {
    const float* x = static_cast<const float*>(packed_x) + (i * depth + int64_t{from} * kTileExact);
    for (int c = 0; c < columns; c += 16) {
      tile_f32(panel + c, x, to - from, from != 0, m - i < kTileExact ? m - i : kTileExact, columns - c,
               out + i * stride + c, stride);
    }
  }
}

void panel_exact(const QuantMatrix& w, const void* packed_x, int m, int n0, int n1, float* out, int64_t stride,
                 void* scratch) {
  int64_t groups = w.k / w.group;
  auto* panel = static_cast<float*>(scratch);
  auto* codes = reinterpret_cast<uint8_t*>(panel + kExactColumns * 32);
  auto* scales = reinterpret_cast<float*>(codes + kExactColumns * 32);
  float* biases = scales + groups * 32;
  unpack_scales(w, n0, n1, scales, biases, biases + groups * 32);
  for (int k0 = 0; k0 < w.k; k0 += kExactColumns) {
    int k1 = k0 + kExactColumns < w.k ? k0 + kExactColumns : w.k;
    for_format(w, [&](auto format) { unpack_codes<decltype(format)>(w, n0, n1, k0, k1, codes); });
    for (int k = k0; k < k1; k++) {
      const uint8_t* from = codes + (k - k0) / 4 * 128 + (k - k0) % 4;
      for (int i = 0; i < 32; i++) {
        panel[(k - k0) * 32 + i] =
            scales[k / w.group * 32 + i] * static_cast<float>(from[4 * i]) + biases[k / w.group * 32 + i];
      }
    }
    tiles_f32(panel, packed_x, w.k, k0, k1, m, n1 - n0, out, stride);
  }
}

int64_t back_scratch_bytes(const QuantMatrix&) {
  return int64_t{kExactColumns} * 32 * 4;
}

void panel_back(const QuantMatrix& w, const void* packed_x, int m, int k0, int k1, float* out, int64_t stride,
                void* scratch) {
  auto* panel = static_cast<float*>(scratch);
  QuantMatrix one = w; // the single group that these columns lie in
  auto skip = static_cast<int64_t>(k0 / w.group) * (w.type == ScaleType::f32 ? 4 : w.type == ScaleType::e8m0 ? 1 : 2);
  one.k = w.group;
  one.scales = static_cast<const char*>(w.scales) + skip;
  one.biases = w.fp4 ? nullptr : static_cast<const char*>(w.biases) + skip;
  for (int n0 = 0; n0 < w.n; n0 += kExactColumns) {
    int n1 = n0 + kExactColumns < w.n ? n0 + kExactColumns : w.n;
    for_format(w, [&](auto format) {
      using F = decltype(format);
      for (int n = n0; n < n1; n++) {
        float scale[8], bias[8];
        row_scales(one, n, scale, bias);
        alignas(32) uint8_t code[32];
        store32(code, decode32<F>(w.codes + n * w.row_bytes + static_cast<int64_t>(k0) * F::bits / 8));
        for (int i = 0; i < 32; i += 8) {
          store8(panel + (n - n0) * 32 + i, fma8(set8(scale[0]), expand8(code + i), set8(bias[0])));
        }
      }
    });
    tiles_f32(panel, packed_x, w.n, n0, n1, m, k1 - k0, out, stride);
  }
}

void raise_to(const float* x, int64_t count, float* largest) {
  for (int64_t i = 0; i < count; i++) {
    float value = __builtin_fabsf(x[i]);
    largest[i] = value > largest[i] ? value : largest[i];
  }
}

void to_f32(const void* from, ScaleType type, int64_t count, float* to) {
  convert(from, type, count, to);
}

constexpr QmmKernels table{kTileFast,        kTileExact,  prepare_fast,       prepare_exact,       rows<true>, rows<false>,
                       packed_x_bytes,   pack_x_fast, pack_x_exact,       panel_scratch_bytes, panel_fast, panel_exact,
                       packed_f32_bytes, pack_x_f32,  back_scratch_bytes, panel_back,          raise_to,   to_f32,
                       convert_back};

} // namespace
} // namespace edger1
