// Matrix products for one instruction set; see ops_table.h for the contracts.
#pragma once

#include "ops_table.h"
#include "simd.h"

namespace edger1 {
namespace {

// Tile shape: accumulators (MR x NV vectors), one row of B and a broadcast must fit the registers.
#if defined(__AVX512F__)
constexpr int kMR = 14, kNV = 2;
#elif defined(__AVX2__)
constexpr int kMR = 6, kNV = 2;
#elif defined(__aarch64__)
constexpr int kMR = 6, kNV = 4;
#else
constexpr int kMR = 6, kNV = 2;
#endif
constexpr int kNR = kNV * kWidth;

template <class T>
EDGER1_INLINE float scalar(const T* p) {
  if constexpr (sizeof(T) == 4) {
    return *p;
  } else {
    T buffer[kWidth] = {*p};
    return load(buffer)[0];
  }
}

template <class T>
static void pack_a_of(float* out, const T* a, int64_t row_stride, int64_t k_stride, int rows, int k) {
  for (int r0 = 0; r0 < rows; r0 += kMR) {
    int mr = rows - r0 < kMR ? rows - r0 : kMR;
    if (k_stride == 1) {
      for (int r = 0; r < mr; r++) {
        const T* row = a + (r0 + r) * row_stride;
        float* to = out + r;
        int i = 0;
        for (; i + kWidth <= k; i += kWidth) {
          vf x = load(row + i);
          for (int j = 0; j < kWidth; j++) {
            to[(i + j) * mr] = x[j];
          }
        }
        if (i < k) {
          vf x = load_n(row + i, k - i);
          for (int j = 0; i + j < k; j++) {
            to[(i + j) * mr] = x[j];
          }
        }
      }
    } else if (row_stride == 1) {
      for (int i = 0; i < k; i++) {
        const T* from = a + i * k_stride + r0;
        float* to = out + i * mr;
        int r = 0;
        for (; r + kWidth <= mr; r += kWidth) {
          store(to + r, load(from + r));
        }
        if (r < mr) {
          store_n(to + r, load_n(from + r, mr - r), mr - r);
        }
      }
    } else {
      for (int i = 0; i < k; i++) {
        for (int r = 0; r < mr; r++) {
          out[i * mr + r] = scalar(a + (r0 + r) * row_stride + i * k_stride);
        }
      }
    }
    out += static_cast<int64_t>(mr) * k;
  }
}

template <class T>
static void pack_b_of(float* out, const T* b, int64_t k_stride, int64_t column_stride, int k, int columns) {
  for (int c0 = 0; c0 < columns; c0 += kNR) {
    int nr = columns - c0 < kNR ? columns - c0 : kNR;
    if (nr < kNR) {
      std::memset(out, 0, sizeof(float) * kNR * static_cast<size_t>(k));
    }
    if (column_stride == 1) {
      for (int i = 0; i < k; i++) {
        const T* from = b + i * k_stride + c0;
        float* to = out + static_cast<int64_t>(i) * kNR;
        if (nr == kNR) {
          for (int v = 0; v < kNV; v++) {
            store(to + v * kWidth, load(from + v * kWidth));
          }
        } else {
          int c = 0;
          for (; c + kWidth <= nr; c += kWidth) {
            store(to + c, load(from + c));
          }
          if (c < nr) {
            store_n(to + c, load_n(from + c, nr - c), nr - c);
          }
        }
      }
    } else if (k_stride == 1) {
      // Transposed: kWidth columns by kWidth steps of k at a time, so that each line of the panel is written once.
      for (int i = 0; i < k; i += kWidth) {
        int depth = k - i < kWidth ? k - i : kWidth;
        for (int c = 0; c < nr; c += kWidth) {
          int width = nr - c < kWidth ? nr - c : kWidth;
          float tile[kWidth][kWidth];
          for (int j = 0; j < width; j++) {
            const T* from = b + (c0 + c + j) * column_stride + i;
            store(tile[j], depth == kWidth ? load(from) : load_n(from, depth));
          }
          for (int d = 0; d < depth; d++) {
            float* to = out + static_cast<int64_t>(i + d) * kNR + c;
            for (int j = 0; j < width; j++) {
              to[j] = tile[j][d];
            }
          }
        }
      }
    } else {
      for (int i = 0; i < k; i++) {
        for (int c = 0; c < nr; c++) {
          out[static_cast<int64_t>(i) * kNR + c] = scalar(b + (c0 + c) * column_stride + i * k_stride);
        }
      }
    }
    out += static_cast<int64_t>(kNR) * k;
  }
}

template <int MR>
static void micro_tile(float* c, int64_t c_stride, const float* a, const float* b, int k, int n, bool accumulate) {
  vf acc[MR][kNV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 4
    for (int v = 0; v < kNV; v++) {
      acc[i][v] = vf{};
    }
  }
  for (int p = 0; p < k; p++) {
    vf row[kNV];
#pragma GCC unroll 4
    for (int v = 0; v < kNV; v++) {
      row[v] = load(b + v * kWidth);
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      vf x = splat(a[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kNV; v++) {
        acc[i][v] = mad(x, row[v], acc[i][v]);
      }
    }
    a += MR;
    b += kNR;
  }
  if (n == kNR) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
#pragma GCC unroll 4
      for (int v = 0; v < kNV; v++) {
        float* to = c + i * c_stride + v * kWidth;
        store(to, accumulate ? load(to) + acc[i][v] : acc[i][v]);
      }
    }
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 4
    for (int v = 0; v < kNV; v++) {
      int left = n - v * kWidth;
      left = left > kWidth ? kWidth : left;
      if (left > 0) {
        float* to = c + i * c_stride + v * kWidth;
        store_n(to, accumulate ? load_n(to, left) + acc[i][v] : acc[i][v], left);
      }
    }
  }
}

using MicroTile = void (*)(float*, int64_t, const float*, const float*, int, int, bool);
template <int... I>
struct MicroTiles {
  static constexpr MicroTile table[] = {nullptr, micro_tile<I>...};
};
#if defined(__AVX512F__)
using Tiles = MicroTiles<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#else
using Tiles = MicroTiles<1, 2, 3, 4, 5, 6>;
#endif

static void gemm(float* c, int64_t c_stride, const float* a, const float* b, int m, int n, int k, bool accumulate) {
  for (int j = 0; j < n; j += kNR) {
    int nr = n - j < kNR ? n - j : kNR;
    const float* panel = b + static_cast<int64_t>(j) * k;
    for (int i = 0; i < m; i += kMR) {
      int mr = m - i < kMR ? m - i : kMR;
      Tiles::table[mr](c + i * c_stride + j, c_stride, a + static_cast<int64_t>(i) * k, panel, k, nr, accumulate);
    }
  }
}

// ROWS dot products with one row of w. Four accumulators a row, always, so that the order of additions is the same
// however many rows are taken together.
template <int ROWS, class T>
EDGER1_INLINE void dot_tile(float* out, int64_t out_stride, const float* x, int64_t x_stride, const T* w, int k) {
  vf acc[ROWS][4];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = vf{};
  }
  int i = 0;
  for (; i + 4 * kWidth <= k; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) {
      vf y = load(w + i + u * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        acc[r][u] = mad(load(x + r * x_stride + i + u * kWidth), y, acc[r][u]);
      }
    }
  }
  for (; i + kWidth <= k; i += kWidth) {
    vf y = load(w + i);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      acc[r][0] = mad(load(x + r * x_stride + i), y, acc[r][0]);
    }
  }
  if (i < k) {
    vf y = load_n(w + i, k - i);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      acc[r][1] = mad(load_n(x + r * x_stride + i, k - i), y, acc[r][1]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    out[r * out_stride] = hsum((acc[r][0] + acc[r][1]) + (acc[r][2] + acc[r][3]));
  }
}

template <class T>
static void dot_rows_of(float* out, int64_t out_stride, const float* x, int64_t x_stride, int rows, const T* w,
                        int64_t w_stride, int k, int64_t j0, int64_t j1) {
  for (int64_t j = j0; j < j1; j++) {
    const T* row = w + j * w_stride;
    int r = 0;
#if defined(__AVX512F__) || defined(__aarch64__)
    for (; r + 4 <= rows; r += 4) {
      dot_tile<4>(out + r * out_stride + j, out_stride, x + r * x_stride, x_stride, row, k);
    }
#endif
    for (; r + 2 <= rows; r += 2) {
      dot_tile<2>(out + r * out_stride + j, out_stride, x + r * x_stride, x_stride, row, k);
    }
    if (r < rows) {
      dot_tile<1>(out + r * out_stride + j, out_stride, x + r * x_stride, x_stride, row, k);
    }
  }
}

template <int ROWS, int VECTORS, class T>
EDGER1_INLINE void axpy_tile(float* out, int64_t out_stride, const float* x, int64_t x_stride, const T* w,
                             int64_t w_stride, int k) {
  vf acc[ROWS][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      acc[r][v] = vf{};
    }
  }
  for (int p = 0; p < k; p++) {
    const T* row = w + p * w_stride;
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      vf y = load(row + v * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        acc[r][v] = mad(splat(x[r * x_stride + p]), y, acc[r][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      store(out + r * out_stride + v * kWidth, acc[r][v]);
    }
  }
}

template <class T>
static void axpy_rows_of(float* out, int64_t out_stride, const float* x, int64_t x_stride, int rows, const T* w,
                         int64_t w_stride, int k, int64_t j0, int64_t j1) {
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int kTogether = 4;
#else
  constexpr int kTogether = 2;
#endif
  int64_t j = j0;
  for (int step = rows == 1 ? 8 : 4; step >= 1; step = step > 1 ? 1 : 0) {
    for (; j + step * kWidth <= j1; j += step * kWidth) {
      int r = 0;
      for (; step == 4 && r + kTogether <= rows; r += kTogether) {
        axpy_tile<kTogether, 4>(out + r * out_stride + j, out_stride, x + r * x_stride, x_stride, w + j, w_stride, k);
      }
      for (; r < rows; r++) {
        float* to = out + r * out_stride + j;
        const float* from = x + r * x_stride;
        if (step == 8) {
          axpy_tile<1, 8>(to, out_stride, from, x_stride, w + j, w_stride, k);
        } else if (step == 4) {
          axpy_tile<1, 4>(to, out_stride, from, x_stride, w + j, w_stride, k);
        } else {
          axpy_tile<1, 1>(to, out_stride, from, x_stride, w + j, w_stride, k);
        }
      }
    }
  }
  if (j < j1) {
    int n = static_cast<int>(j1 - j);
    for (int r = 0; r < rows; r++) {
      vf acc{};
      for (int p = 0; p < k; p++) {
        acc = mad(splat(x[r * x_stride + p]), load_n(w + p * w_stride + j, n), acc);
      }
      store_n(out + r * out_stride + j, acc, n);
    }
  }
}

// Calls f with p typed as `type` says.
template <class F>
EDGER1_INLINE void typed(const void* p, Float type, F f) {
  switch (type) {
    case Float::f32:
      return f(static_cast<const float*>(p));
    case Float::bf16:
      return f(static_cast<const bf16*>(p));
    case Float::f16:
      return f(static_cast<const f16*>(p));
  }
}

static void pack_a(float* out, const void* a, Float type, int64_t row_stride, int64_t k_stride, int rows, int k) {
  typed(a, type, [&](auto* p) { pack_a_of(out, p, row_stride, k_stride, rows, k); });
}
static void pack_b(float* out, const void* b, Float type, int64_t k_stride, int64_t column_stride, int k, int columns) {
  typed(b, type, [&](auto* p) { pack_b_of(out, p, k_stride, column_stride, k, columns); });
}
static void dot_rows(float* out, int64_t out_stride, const float* x, int64_t x_stride, int rows, const void* w,
                     Float type, int64_t w_stride, int k, int64_t j0, int64_t j1) {
  typed(w, type, [&](auto* p) { dot_rows_of(out, out_stride, x, x_stride, rows, p, w_stride, k, j0, j1); });
}
static void axpy_rows(float* out, int64_t out_stride, const float* x, int64_t x_stride, int rows, const void* w,
                      Float type, int64_t w_stride, int k, int64_t j0, int64_t j1) {
  typed(w, type, [&](auto* p) { axpy_rows_of(out, out_stride, x, x_stride, rows, p, w_stride, k, j0, j1); });
}

static void to_f32(float* out, const void* in, Float type, int64_t n) {
  typed(in, type, [&](auto* p) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      store(out + i, load(p + i));
    }
    if (i < n) {
      store_n(out + i, load_n(p + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    }
  });
}
static void from_f32(void* out, Float type, const float* in, int64_t n) {
  typed(out, type, [&](auto* p) {
    auto* to = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(p)>>*>(p);
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      store(to + i, load(in + i));
    }
    if (i < n) {
      store_n(to + i, load_n(in + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    }
  });
}

} // namespace
} // namespace edger1
