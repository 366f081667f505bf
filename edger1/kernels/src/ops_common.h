// What the dense operations share: dtypes, rows of strided arrays, transformations by way of MLX's own operations.
#pragma once

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "ops_table.h"
#include "primitive.h"

namespace edger1 {

inline bool is_float(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::bfloat16 || dtype == mx::float16;
}

inline Float float_of(mx::Dtype dtype) {
  return dtype == mx::bfloat16 ? Float::bf16 : dtype == mx::float16 ? Float::f16 : Float::f32;
}

inline bool on_cpu(const mx::StreamOrDevice& s) {
  return mx::to_stream(s).device == mx::Device(mx::Device::cpu);
}

// A primitive with one output whose derivatives and vectorisation are, unless a subclass knows better, those of the
// same computation in MLX's own operations.
class DensePrimitive : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;

  virtual std::vector<mx::array> fallback(const std::vector<mx::array>& inputs) = 0;

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    auto [_, gradients] = mx::vjp(along(primals, argnums), chosen(primals, argnums), cotangents);
    return gradients;
  }

  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override {
    auto [_, derivatives] = mx::jvp(along(primals, argnums), chosen(primals, argnums), tangents);
    return derivatives;
  }

  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override {
    auto function = [this](const std::vector<mx::array>& in) { return fallback(in); };
    auto outputs = mx::vmap(function, axes)(inputs);
    return {outputs, std::vector<int>(outputs.size(), 0)};
  }

 private:
  // The fallback as a function of the arguments in `argnums` alone.
  std::function<std::vector<mx::array>(const std::vector<mx::array>&)> along(const std::vector<mx::array>& primals,
                                                                            const std::vector<int>& argnums) {
    return [this, primals, argnums](const std::vector<mx::array>& some) {
      std::vector<mx::array> all = primals;
      for (size_t i = 0; i < argnums.size(); i++) {
        all[argnums[i]] = some[i];
      }
      return fallback(all);
    };
  }
  static std::vector<mx::array> chosen(const std::vector<mx::array>& primals, const std::vector<int>& argnums) {
    std::vector<mx::array> some;
    for (int i : argnums) {
      some.push_back(primals[i]);
    }
    return some;
  }
};

// Where the rows (all axes but the last `inner`) of an array begin, in elements.
class RowMap {
 public:
  static constexpr int kMaxAxes = 8;

  RowMap() = default;
  RowMap(const mx::array& a, int inner) {
    for (int i = 0; i < static_cast<int>(a.ndim()) - inner; i++) {
      int64_t size = a.shape(i), stride = a.strides(i);
      rows_ *= size;
      if (size == 1) {
        continue;
      }
      if (axes_ > 0 && stride_[axes_ - 1] == stride * size) {
        size_[axes_ - 1] *= size;
        stride_[axes_ - 1] = stride;
        continue;
      }
      if (axes_ == kMaxAxes) {
        throw std::invalid_argument("an array has more than 8 axes that cannot be merged");
      }
      size_[axes_] = size;
      stride_[axes_++] = stride;
    }
  }

  int64_t rows() const {
    return rows_;
  }
  int64_t operator()(int64_t row) const {
    if (axes_ == 1) {
      return row * stride_[0];
    }
    int64_t offset = 0;
    for (int i = axes_ - 1; i >= 0; i--) {
      offset += row % size_[i] * stride_[i];
      row /= size_[i];
    }
    return offset;
  }
  // Whether rows lie at one stride, which is then `stride()`.
  bool uniform() const {
    return axes_ <= 1;
  }
  int64_t stride() const {
    return axes_ == 0 ? 0 : stride_[0];
  }

 private:
  int axes_ = 0;
  int64_t rows_ = 1;
  int64_t size_[kMaxAxes] = {};
  int64_t stride_[kMaxAxes] = {};
};

// A strided array as its evaluated pointers and rows, for closures.
struct Rows {
  const void* data = nullptr;
  Float type = Float::f32;
  RowMap map;
  int64_t step = 1;
  int n = 0;

  Rows() = default;
  explicit Rows(const mx::array& a)
      : data(a.data<void>()), type(float_of(a.dtype())), map(a, 1), step(a.ndim() ? a.strides(-1) : 1),
        n(a.ndim() ? a.shape(-1) : 1) {
    if (n == 1) {
      step = 1;
    }
  }

  // Row `row` as contiguous floats: where it lies if it is that, else gathered into `scratch` (n floats).
  const float* fetch(int64_t row, float* scratch) const {
    const void* at = offset(data, type, map(row));
    if (step == 1) {
      if (type == Float::f32) {
        return static_cast<const float*>(at);
      }
      ops().to_f32(scratch, at, type, n);
      return scratch;
    }
    for (int i = 0; i < n; i++) {
      const void* element = offset(at, type, i * step);
      if (type == Float::f32) {
        scratch[i] = *static_cast<const float*>(element);
      } else {
        ops().to_f32(scratch + i, element, type, 1);
      }
    }
    return scratch;
  }
};

// A contiguous array to write rows of n to; rows that are not float32 pass through a buffer.
struct OutRows {
  void* data;
  Float type;
  int n;

  explicit OutRows(mx::array& a) : data(a.data<void>()), type(float_of(a.dtype())), n(a.ndim() ? a.shape(-1) : 1) {}

  float* place(int64_t row, float* scratch) const {
    return type == Float::f32 ? static_cast<float*>(data) + row * n : scratch;
  }
  void finish(int64_t row, const float* from) const {
    if (type != Float::f32) {
      ops().from_f32(offset(data, type, row * n), type, from, n);
    }
  }
};

// Gives `out` the buffer of `in` where nobody else needs it and the layout is plain, else a new one.
inline void allocate_or_reuse(const mx::array& in, mx::array& out) {
  if (in.is_donatable() && in.flags().row_contiguous && in.dtype() == out.dtype() && in.size() == out.size() &&
      in.data_size() == in.size()) {
    out.copy_shared_buffer(in);
  } else {
    allocate(out);
  }
}

} // namespace edger1
