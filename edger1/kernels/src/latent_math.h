// Blocked matrix products for latent attention: f32 as everywhere, or bf16 in matrix tiles (AMX) or in vectors.
//
// Operands are packed once and used many times. An element of the result is one chain of additions over k, whatever rows
// and columns it is computed with, so that a row among many has the bits of the row alone.
#pragma once

#include "ops_table.h"

namespace edger1 {

// One of the products that a result is the sum of.
struct LatentProduct {
  const void* a;
  const void* b;
  int k;
};

struct LatentMath {
  // Rows of A that are best taken together, and of which number multiples are.
  int row_tile, row_step;
  // Buffers of so many bytes, aligned to 64, hold a packed operand.
  int64_t (*a_bytes)(int rows, int k);
  int64_t (*b_bytes)(int k, int columns);
  // Element (i, p) of A lies at a[i * row_stride + p * k_stride], (p, j) of B at b[p * k_stride + j * column_stride].
  void (*pack_a)(void* out, const void* a, Float type, int64_t row_stride, int64_t k_stride, int rows, int k);
  void (*pack_b)(void* out, const void* b, Float type, int64_t k_stride, int64_t column_stride, int k, int columns);
  // c (m x n) = or += the sum of the products; those without k count for nothing.
  void (*gemm)(float* c, int64_t c_stride, const LatentProduct* products, int count, int m, int n, bool accumulate);

  void multiply(float* c, int64_t c_stride, LatentProduct product, int m, int n, bool accumulate) const {
    gemm(c, c_stride, &product, 1, m, n, accumulate);
  }
};

// That in bf16, if wanted and there.
const LatentMath& latent_math(bool bf16);

// Null where this build has no matrix tiles, or no products of bf16 in vectors.
extern const LatentMath* const latent_math_amx;
extern const LatentMath* const latent_math_bf16;

} // namespace edger1
