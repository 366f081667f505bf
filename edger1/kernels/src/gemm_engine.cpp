#include "gemm_engine.h"

#include <algorithm>
#include <cstring>

#include "cpu_features.h"
#include "pool.h"

namespace edger1 {
namespace {

size_t padded(int64_t bytes) {
  return static_cast<size_t>((bytes + 63) / 64 * 64);
}

size_t plain_a_bytes(int64_t rows, int64_t k) {
  return padded(rows * k * 4);
}
size_t plain_b_bytes(int64_t k, int64_t columns) {
  int64_t nr = ops().nr;
  return static_cast<size_t>((columns + nr - 1) / nr * nr * k * 4);
}
void plain_pack_a(void* out, const Matrix& a, int rows, int k) {
  ops().pack_a(static_cast<float*>(out), a.data, a.type, a.row_stride, a.column_stride, rows, k);
}
void plain_pack_b(void* out, const Matrix& b, int k, int columns) {
  ops().pack_b(static_cast<float*>(out), b.data, b.type, b.row_stride, b.column_stride, k, columns);
}
void plain_gemm(float* c, int64_t c_stride, const void* a, const void* b, int m, int n, int k, bool accumulate) {
  ops().gemm(c, c_stride, static_cast<const float*>(a), static_cast<const float*>(b), m, n, k, accumulate);
}

void clear(float* c, int64_t c_stride, int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; i++) {
    std::memset(c + i * c_stride, 0, sizeof(float) * static_cast<size_t>(n));
  }
}

Matrix part(const Matrix& a, int64_t row, int64_t column) {
  return a.at(row * a.row_stride + column * a.column_stride);
}

} // namespace

const GemmEngine& gemm_engine(bool mixed) {
  static const GemmEngine plain{Float::f32,   ops().nr,     plain_a_bytes, plain_b_bytes,
                                plain_pack_a, plain_pack_b, plain_gemm};
  static const GemmEngine* const rounding = gemm_engine_amx && active_isa_has_amx()     ? gemm_engine_amx
                                            : gemm_engine_bf16 && active_isa_has_bf16() ? gemm_engine_bf16
                                                                                        : nullptr;
  return mixed && rounding ? *rounding : plain;
}

void engine_matmul_serial(const GemmEngine& engine, float* c, int64_t c_stride, const Matrix& a, const Matrix& b,
                          int64_t m, int64_t n, int64_t k) {
  if (k == 0) {
    return clear(c, c_stride, m, n);
  }
  int64_t depth = std::min(k, kPackedDepth), rows = std::min<int64_t>(m, 256), columns = std::min<int64_t>(n, 1024);
  auto* packed_b = static_cast<char*>(thread_scratch(0, engine.a_bytes(rows, depth) + engine.b_bytes(depth, columns)));
  char* packed_a = packed_b + engine.b_bytes(depth, columns);
  for (int64_t j = 0; j < n; j += columns) {
    int width = static_cast<int>(std::min(columns, n - j));
    for (int64_t p = 0; p < k; p += depth) {
      int d = static_cast<int>(std::min(depth, k - p));
      engine.pack_b(packed_b, part(b, p, j), d, width);
      for (int64_t i = 0; i < m; i += rows) {
        int height = static_cast<int>(std::min(rows, m - i));
        engine.pack_a(packed_a, part(a, i, p), height, d);
        engine.gemm(c + i * c_stride + j, c_stride, packed_a, packed_b, height, width, d, p > 0);
      }
    }
  }
}

void engine_matmul(const GemmEngine& engine, float* c, int64_t c_stride, const Matrix& a, const Matrix& b, int64_t m,
                   int64_t n, int64_t k) {
  if (m == 0 || n == 0) {
    return;
  }
  if (k == 0 || m * n * k <= 64 * 64 * 64) {
    return engine_matmul_serial(engine, c, c_stride, a, b, m, n, k);
  }
  int64_t depth = std::min(k, kPackedDepth), columns = std::min<int64_t>(n, 2048);
  // Blocks of rows: whole tiles, four a thread where there are rows enough.
  int64_t rows = std::clamp<int64_t>((m / (4 * pool_threads()) + 31) / 32 * 32, 32, 256);
  auto* packed_b = static_cast<char*>(thread_scratch(1, engine.b_bytes(depth, columns)));
  int64_t step = std::max<int64_t>(engine.columns, 64);
  for (int64_t j = 0; j < n; j += columns) {
    int64_t width = std::min(columns, n - j);
    for (int64_t p = 0; p < k; p += depth) {
      int d = static_cast<int>(std::min(depth, k - p));
      parallel_for((width + step - 1) / step, [&](int64_t piece) {
        int64_t j0 = piece * step;
        engine.pack_b(packed_b + engine.b_bytes(d, j0), part(b, p, j + j0), d,
                      static_cast<int>(std::min(step, width - j0)));
      });
      parallel_for((m + rows - 1) / rows, [&](int64_t block) {
        int64_t i = block * rows;
        int height = static_cast<int>(std::min(rows, m - i));
        void* packed_a = thread_scratch(0, engine.a_bytes(height, d));
        engine.pack_a(packed_a, part(a, i, p), height, d);
        engine.gemm(c + i * c_stride + j, c_stride, packed_a, packed_b, height, static_cast<int>(width), d, p > 0);
      });
    }
  }
}

} // namespace edger1
