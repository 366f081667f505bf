// Matrix products for training, on operands that the caller packs and may use many times over.
//
// Engines with one interface: f32 throughout, and `mixed`, which rounds operands to bf16 and adds up in f32, on matrix
// tiles or in vectors. Nothing here depends on the number of threads: every element of a result is one chain of additions over
// k in the order of k.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dense_driver.h"

namespace edger1 {

struct GemmEngine {
  // What intermediate results that will be packed again may be stored as without losing anything more.
  Float stored;
  // B is packed in panels of so many columns; a range of columns that begins at a multiple begins at
  // b_bytes(k, first column).
  int columns;
  size_t (*a_bytes)(int64_t rows, int64_t k);
  size_t (*b_bytes)(int64_t k, int64_t columns);
  // a is rows x k, b is k x columns; one of the two strides must be 1. f32 or bf16.
  void (*pack_a)(void* out, const Matrix& a, int rows, int k);
  void (*pack_b)(void* out, const Matrix& b, int k, int columns);
  // c (m x n) = or += packed a * packed b, on the calling thread.
  void (*gemm)(float* c, int64_t c_stride, const void* a, const void* b, int m, int n, int k, bool accumulate);
};

// The engine for f32, or a mixed one where it is asked for and the processor has products of bf16.
const GemmEngine& gemm_engine(bool mixed);

// Null where this build has no matrix tiles, or no products of bf16 in vectors.
extern const GemmEngine* const gemm_engine_amx;
extern const GemmEngine* const gemm_engine_bf16;

// k is taken in pieces of so many, so that packed panels stay in the first-level cache.
constexpr int64_t kPackedDepth = 512;

// c (m x n) = a b on the pool's threads; uses both scratch slots.
void engine_matmul(const GemmEngine& engine, float* c, int64_t c_stride, const Matrix& a, const Matrix& b, int64_t m,
                   int64_t n, int64_t k);

// The same on the calling thread, with slot 0 only.
void engine_matmul_serial(const GemmEngine& engine, float* c, int64_t c_stride, const Matrix& a, const Matrix& b,
                          int64_t m, int64_t n, int64_t k);

} // namespace edger1
