// Splits dense matrix products into pieces of work for the pool; knows nothing of MLX's graph.
#pragma once

#include <cstdint>

#include "ops_table.h"

namespace edger1 {

// Rows times columns, element (i, j) at data[i * row_stride + j * column_stride].
struct Matrix {
  const void* data = nullptr;
  Float type = Float::f32;
  int64_t row_stride = 0;
  int64_t column_stride = 0;

  Matrix at(int64_t elements) const {
    return {offset(data, type, elements), type, row_stride, column_stride};
  }
};

// Up to so many rows a row's result is bit-identical to that of the row alone.
constexpr int kInvariantRows = 16;

// c (m x n, rows c_stride apart) = a (m x k) b (k x n) + bias (n, or null), on the pool's threads. Uses both scratch
// slots, so it must not be called from within a chunk.
void matmul(float* c, int64_t c_stride, const Matrix& a, const Matrix& b, const float* bias, int64_t m, int64_t n,
            int64_t k);

// The same on the calling thread alone, with slot 0 only.
void matmul_serial(float* c, int64_t c_stride, const Matrix& a, const Matrix& b, const float* bias, int64_t m,
                   int64_t n, int64_t k);

} // namespace edger1
