// Splits a quantized matmul into pieces of work for the pool; knows nothing of MLX's graph.
#pragma once

#include <cstdint>
#include <vector>

#include "qmm_kernels.h"

namespace edger1 {

// Rows of x or of the result: where each row starts (in elements) and how far apart its elements are.
struct RowSet {
  const void* data = nullptr;
  ScaleType type = ScaleType::f32;
  int64_t element_stride = 1;
  std::vector<int64_t> offsets;
};

// Rows that meet the same matrix: x.offsets[x_rows[i]] gives out row out_rows[i], for begin <= i < end.
struct Group {
  QuantMatrix w;
  int64_t begin = 0;
  int64_t end = 0;
};

struct QmmJob {
  bool fast = false;
  bool transpose = true;
  RowSet x;
  std::vector<int64_t> x_rows;
  std::vector<int64_t> out_rows;
  std::vector<Group> groups;
  void* out = nullptr;             // contiguous rows of out_columns
  ScaleType out_type = ScaleType::f32;
  int out_columns = 0;
};

void run_qmm(const QmmJob& job);

// The inner loops in use.
const QmmKernels& qmm_kernels();

// Sets bias_ratio of an affine matrix whose biases are all -2^(bits - 1) times their scales, as formats without a zero
// point (GGUF's Q4_0 and Q8_0) give. Reads all scales of such a matrix, of others a few.
void find_bias_ratio(QuantMatrix& w);

} // namespace edger1
