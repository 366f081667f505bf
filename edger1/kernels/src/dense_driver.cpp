#include "dense_driver.h"

#include <algorithm>
#include <cstring>

#include "cpu_features.h"
#include "pool.h"

namespace edger1 {

const OpsTable& ops() {
#if defined(__x86_64__)
  static const OpsTable& table = table_for_isa<OpsTable>(&ops_portable, &ops_avx2, &ops_avx512vnni, nullptr);
#elif defined(__aarch64__)
  static const OpsTable& table = table_for_isa<OpsTable>(&ops_portable, nullptr, nullptr, &ops_neon);
#else
  static const OpsTable& table = ops_portable;
#endif
  return table;
}

namespace {

// A panel of B (kDepth x nr floats) stays in the first-level cache, a block of A (kRows x kDepth) in the second.
constexpr int64_t kDepth = 256;
constexpr int64_t kColumns = 2048;

int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Rows of an A block: about a quarter of a megabyte, in whole panels.
int64_t block_rows() {
  return round_up(112, ops().mr);
}

void fill(float* c, int64_t c_stride, const float* bias, int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; i++) {
    if (bias) {
      std::memcpy(c + i * c_stride, bias, sizeof(float) * static_cast<size_t>(n));
    } else {
      std::memset(c + i * c_stride, 0, sizeof(float) * static_cast<size_t>(n));
    }
  }
}

void add_bias(float* c, int64_t c_stride, const float* bias, int64_t m, int64_t j0, int64_t j1) {
  if (bias) {
    for (int64_t i = 0; i < m; i++) {
      for (int64_t j = j0; j < j1; j++) {
        c[i * c_stride + j] += bias[j];
      }
    }
  }
}

// Rows of `a` as contiguous floats, in `scratch` unless they are that already.
const float* plain_rows(const Matrix& a, int64_t m, int64_t k, float* scratch, int64_t& stride) {
  if (a.type == Float::f32 && (a.column_stride == 1 || k == 1)) {
    stride = a.row_stride;
    return static_cast<const float*>(a.data);
  }
  stride = k;
  for (int64_t i = 0; i < m; i++) {
    Matrix row = a.at(i * a.row_stride);
    if (a.column_stride == 1) {
      ops().to_f32(scratch + i * k, row.data, a.type, k);
    } else {
      for (int64_t j = 0; j < k; j++) {
        ops().to_f32(scratch + i * k + j, row.at(j * a.column_stride).data, a.type, 1);
      }
    }
  }
  return scratch;
}

bool few_rows_path(const Matrix& b, int64_t m, int64_t n, int64_t k) {
  return m <= kInvariantRows && (b.row_stride == 1 || b.column_stride == 1 || k == 1 || n == 1);
}

void few_rows(float* c, int64_t c_stride, const float* x, int64_t x_stride, const Matrix& b, const float* bias,
              int64_t m, int64_t k, int64_t j0, int64_t j1) {
  bool along_k = b.row_stride == 1 || k == 1;
  auto product = along_k ? ops().dot_rows : ops().axpy_rows;
  product(c, c_stride, x, x_stride, static_cast<int>(m), b.data, b.type, along_k ? b.column_stride : b.row_stride,
          static_cast<int>(k), j0, j1);
  add_bias(c, c_stride, bias, m, j0, j1);
}

} // namespace

void matmul_serial(float* c, int64_t c_stride, const Matrix& a, const Matrix& b, const float* bias, int64_t m,
                   int64_t n, int64_t k) {
  if (m == 0 || n == 0) {
    return;
  }
  if (k == 0) {
    return fill(c, c_stride, bias, m, n);
  }
  if (few_rows_path(b, m, n, k)) {
    int64_t stride;
    auto* scratch = static_cast<float*>(thread_scratch(0, sizeof(float) * static_cast<size_t>(m * k)));
    const float* x = plain_rows(a, m, k, scratch, stride);
    return few_rows(c, c_stride, x, stride, b, bias, m, k, 0, n);
  }
  int64_t columns = std::min<int64_t>(round_up(n, ops().nr), 512), rows = std::min(m, block_rows());
  int64_t depth = std::min(k, kDepth);
  auto* packed_b = static_cast<float*>(
      thread_scratch(0, sizeof(float) * static_cast<size_t>(columns * depth + round_up(rows * depth, 16))));
  float* packed_a = packed_b + columns * depth;
  for (int64_t j = 0; j < n; j += columns) {
    int64_t width = std::min(columns, n - j);
    for (int64_t p = 0; p < k; p += depth) {
      int64_t d = std::min(depth, k - p);
      ops().pack_b(packed_b, b.at(p * b.row_stride + j * b.column_stride).data, b.type, b.row_stride, b.column_stride,
                   static_cast<int>(d), static_cast<int>(width));
      for (int64_t i = 0; i < m; i += rows) {
        int64_t height = std::min(rows, m - i);
        ops().pack_a(packed_a, a.at(i * a.row_stride + p * a.column_stride).data, a.type, a.row_stride, a.column_stride,
                     static_cast<int>(height), static_cast<int>(d));
        ops().gemm(c + i * c_stride + j, c_stride, packed_a, packed_b, static_cast<int>(height),
                   static_cast<int>(width), static_cast<int>(d), p > 0);
      }
    }
  }
  add_bias(c, c_stride, bias, m, 0, n);
}

void matmul(float* c, int64_t c_stride, const Matrix& a, const Matrix& b, const float* bias, int64_t m, int64_t n,
            int64_t k) {
  if (m == 0 || n == 0) {
    return;
  }
  if (k == 0) {
    return fill(c, c_stride, bias, m, n);
  }
  if (few_rows_path(b, m, n, k)) {
    int64_t stride;
    auto* scratch = static_cast<float*>(thread_scratch(1, sizeof(float) * static_cast<size_t>(m * k)));
    const float* x = plain_rows(a, m, k, scratch, stride);
    // A column costs its bytes, or its arithmetic where rows are many; 48 KiB take about two microseconds.
    double cost = static_cast<double>(k) * std::max<double>(static_cast<double>(bytes_of(b.type)), 0.5 * m);
    int64_t grain = grain_for(n, cost, 48.0 * 1024, 128);
    parallel_ranges(n, grain, [&](int64_t j0, int64_t j1) { few_rows(c, c_stride, x, stride, b, bias, m, k, j0, j1); });
    return;
  }
  if (m * n * k <= 64 * 64 * 64) {
    return matmul_serial(c, c_stride, a, b, bias, m, n, k);
  }
  int64_t nr = ops().nr, columns = std::min(round_up(n, nr), kColumns), rows = std::min(m, block_rows());
  int64_t depth = std::min(k, kDepth);
  auto* packed_b = static_cast<float*>(thread_scratch(1, sizeof(float) * static_cast<size_t>(columns * depth)));
  int64_t row_blocks = (m + rows - 1) / rows;
  for (int64_t j = 0; j < n; j += columns) {
    int64_t width = std::min(columns, n - j), panels = (width + nr - 1) / nr;
    // Where the rows alone give too few pieces for the threads, columns are split as well.
    int64_t pieces = std::clamp<int64_t>((4 * pool_threads() + row_blocks - 1) / row_blocks, 1, panels);
    int64_t piece = (panels + pieces - 1) / pieces * nr;
    pieces = (width + piece - 1) / piece;
    for (int64_t p = 0; p < k; p += depth) {
      int64_t d = std::min(depth, k - p);
      parallel_ranges(panels, 4, [&](int64_t first, int64_t last) {
        int64_t j0 = first * nr, j1 = std::min(last * nr, width);
        ops().pack_b(packed_b + j0 * d, b.at(p * b.row_stride + (j + j0) * b.column_stride).data, b.type, b.row_stride,
                     b.column_stride, static_cast<int>(d), static_cast<int>(j1 - j0));
      });
      parallel_for(row_blocks * pieces, [&](int64_t chunk) {
        int64_t i = chunk / pieces * rows, j0 = chunk % pieces * piece;
        int64_t height = std::min(rows, m - i), j1 = std::min(j0 + piece, width);
        auto* packed_a = static_cast<float*>(thread_scratch(0, sizeof(float) * static_cast<size_t>(height * d)));
        ops().pack_a(packed_a, a.at(i * a.row_stride + p * a.column_stride).data, a.type, a.row_stride, a.column_stride,
                     static_cast<int>(height), static_cast<int>(d));
        ops().gemm(c + i * c_stride + j + j0, c_stride, packed_a, packed_b + j0 * d, static_cast<int>(height),
                   static_cast<int>(j1 - j0), static_cast<int>(d), p > 0);
      });
    }
  }
  add_bias(c, c_stride, bias, m, 0, n);
}

} // namespace edger1
