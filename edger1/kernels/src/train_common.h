// What the operations of training share: f32 arrays in row-major order, packing of gathered rows.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "gemm_engine.h"
#include "mlx/ops.h"
#include "ops_common.h"
#include "pool.h"

namespace edger1 {

// An input as it is read: f32 and contiguous. Throws std::invalid_argument for another dtype or number of axes.
inline mx::array plain_input(const mx::array& a, int ndim, const char* what, mx::Dtype dtype = mx::float32) {
  if (a.dtype() != dtype || static_cast<int>(a.ndim()) != ndim) {
    throw std::invalid_argument(std::string(what) + " has another dtype or number of axes than expected");
  }
  return mx::contiguous(a, false, mx::default_stream(mx::Device(mx::Device::cpu)));
}

inline void require(bool holds, const char* message) {
  if (!holds) {
    throw std::invalid_argument(message);
  }
}

inline mx::Stream train_stream(const char* what) {
  return cpu_stream(mx::default_stream(mx::Device(mx::Device::cpu)), what);
}

// A primitive with a fixed list of output shapes and a task made from input and output pointers.
class TrainPrimitive : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  bool is_equivalent(const mx::Primitive&) const override {
    return false;
  }
};

inline Matrix rows_of(const float* data, int64_t columns) {
  return {data, Float::f32, columns, 1};
}
inline Matrix transposed(const Matrix& a) {
  return {a.data, a.type, a.column_stride, a.row_stride};
}

// About `columns` columns of a packed operand, in whole panels.
inline int64_t engine_piece(const GemmEngine& engine, int64_t columns) {
  return (columns + engine.columns - 1) / engine.columns * engine.columns;
}

// Hands out pieces of one allocation, each on a line of its own.
class Carver {
 public:
  size_t reserve(size_t bytes) {
    size_t at = total_;
    total_ += (bytes + 63) / 64 * 64;
    return at;
  }
  size_t total() const {
    return total_;
  }

 private:
  size_t total_ = 0;
};

} // namespace edger1
