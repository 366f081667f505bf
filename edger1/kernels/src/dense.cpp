#include "dense.h"

#include <algorithm>
#include <memory>

#include "dense_driver.h"

namespace edger1 {
namespace {

Matrix matrix_of(const mx::array& a) {
  return {a.data<void>(), float_of(a.dtype()), a.shape(-2) == 1 ? a.shape(-1) : a.strides(-2),
          a.shape(-1) == 1 ? 1 : a.strides(-1)};
}

std::vector<float> plain_vector(const void* data, Float type, int64_t stride, int64_t n) {
  std::vector<float> found(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; i++) {
    ops().to_f32(found.data() + i, offset(data, type, i * stride), type, 1);
  }
  return found;
}

// Computes into float32 and converts where the result has another type.
template <class Compute>
void through_f32(void* out, Float type, int64_t size, Compute compute) {
  if (type == Float::f32) {
    return compute(static_cast<float*>(out));
  }
  std::unique_ptr<float[]> buffer(new float[static_cast<size_t>(size)]);
  compute(buffer.get());
  parallel_ranges(size, 1 << 16, [&](int64_t begin, int64_t end) {
    ops().from_f32(offset(out, type, begin), type, buffer.get() + begin, end - begin);
  });
}

mx::array transposed(const mx::array& a, mx::Stream s) {
  return mx::swapaxes(a, -1, -2, s);
}

// Inputs a [..., M, K], b [K, N] or [..., K, N] with a's batch axes, and perhaps a bias [N].
class Matmul : public DensePrimitive {
 public:
  using DensePrimitive::DensePrimitive;

  const char* name() const override {
    return "EdgeR1Matmul";
  }
  bool is_equivalent(const mx::Primitive&) const override {
    return true;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape[shape.size() - 1] = inputs[1].shape(-1);
    return {shape};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& inputs) override {
    auto product = mx::matmul(inputs[0], inputs[1], stream());
    return {inputs.size() > 2 ? mx::add(product, inputs[2], stream()) : product};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& out = outputs[0];
    allocate(out);
    if (out.size() == 0) {
      return;
    }
    const auto &a = inputs[0], &b = inputs[1];
    int64_t m = a.shape(-2), k = a.shape(-1), n = b.shape(-1);
    Matrix left = matrix_of(a), right = matrix_of(b);
    RowMap left_at(a, 2), right_at(b, 2);
    int64_t batch = left_at.rows();
    if (b.ndim() == 2) {
      // One matrix for all rows: the batch axes of a are more rows, if they lie as such.
      RowMap rows(a, 1);
      if (rows.uniform() || rows.rows() == 1) {
        m = rows.rows();
        left.row_stride = rows.rows() == 1 ? k : rows.stride();
        batch = 1;
      }
    }
    const void* bias = nullptr;
    Float bias_type = Float::f32;
    int64_t bias_stride = 1;
    if (inputs.size() > 2) {
      bias = inputs[2].data<void>();
      bias_type = float_of(inputs[2].dtype());
      bias_stride = inputs[2].strides(0);
    }
    bool shared = b.ndim() == 2;
    void* to = out.data<void>();
    Float type = float_of(out.dtype());
    launch(stream(), [=] {
      std::vector<float> converted;
      const float* plain_bias = static_cast<const float*>(bias);
      if (bias && (bias_type != Float::f32 || bias_stride != 1)) {
        converted = plain_vector(bias, bias_type, bias_stride, n);
        plain_bias = converted.data();
      }
      through_f32(to, type, batch * m * n, [&](float* c) {
        auto one = [&](auto product, int64_t i) {
          product(c + i * m * n, n, left.at(left_at(i)), shared ? right : right.at(right_at(i)), plain_bias, m, n, k);
        };
        if (batch >= 2 * pool_threads() && m * n * k < (int64_t{1} << 22)) {
          int64_t grain = grain_for(batch, static_cast<double>(m * n * k), 64.0 * 1024);
          parallel_ranges(batch, grain, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
              one(matmul_serial, i);
            }
          });
        } else {
          for (int64_t i = 0; i < batch; i++) {
            one(matmul, i);
          }
        }
      });
    });
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    const auto &a = primals[0], &b = primals[1], &d = cotangents[0];
    mx::Stream s = stream();
    std::vector<mx::array> gradients;
    for (int arg : argnums) {
      if (arg == 0) {
        gradients.push_back(dense_matmul(d, transposed(b, s), s));
      } else if (arg == 1 && b.ndim() == 2 && a.ndim() > 2) {
        auto rows = mx::flatten(a, 0, -2, s), flat = mx::flatten(d, 0, -2, s);
        gradients.push_back(dense_matmul(transposed(rows, s), flat, s));
      } else if (arg == 1) {
        gradients.push_back(dense_matmul(transposed(a, s), d, s));
      } else {
        gradients.push_back(mx::sum(mx::flatten(d, 0, -2, s), 0, false, s));
      }
      gradients.back() = mx::astype(gradients.back(), primals[arg].dtype(), s);
    }
    return gradients;
  }
};

mx::array make_matmul(mx::array a, mx::array b, const std::optional<mx::array>& bias, mx::Stream stream) {
  if (b.ndim() > 2) {
    // Batch axes are broadcast as views, so that their gradients sum by themselves.
    mx::Shape batch_a(a.shape().begin(), a.shape().end() - 2), batch_b(b.shape().begin(), b.shape().end() - 2);
    mx::Shape batch = mx::broadcast_shapes(batch_a, batch_b);
    auto widen = [&](mx::array& x) {
      mx::Shape shape = batch;
      shape.push_back(x.shape(-2));
      shape.push_back(x.shape(-1));
      if (x.shape() != shape) {
        x = mx::broadcast_to(x, shape, stream);
      }
    };
    widen(a);
    widen(b);
  }
  mx::Shape shape = a.shape();
  shape[shape.size() - 1] = b.shape(-1);
  mx::Dtype dtype = mx::promote_types(a.dtype(), b.dtype());
  std::vector<mx::array> inputs{std::move(a), std::move(b)};
  if (bias) {
    dtype = mx::promote_types(dtype, bias->dtype());
    inputs.push_back(*bias);
  }
  return mx::array(shape, dtype, std::make_shared<Matmul>(stream), std::move(inputs));
}

bool covered(const mx::array& a, const mx::array& b, const mx::StreamOrDevice& s) {
  return on_cpu(s) && is_float(a.dtype()) && is_float(b.dtype()) && a.ndim() >= 2 && b.ndim() >= 2 &&
      a.ndim() <= 8 && b.ndim() <= 8 && a.shape(-1) == b.shape(-2);
}

// Inputs a [A, M, K], b [B, K, N], lhs_indices and rhs_indices of one shape [...]; output [..., M, N].
class GatherMatmul : public DensePrimitive {
 public:
  using DensePrimitive::DensePrimitive;

  const char* name() const override {
    return "EdgeR1GatherMatmul";
  }
  bool is_equivalent(const mx::Primitive&) const override {
    return true;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[2].shape();
    shape.push_back(inputs[0].shape(-2));
    shape.push_back(inputs[1].shape(-1));
    return {shape};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& inputs) override {
    // MLX's own takes float32 only.
    mx::Stream s = stream();
    auto product = mx::gather_mm(mx::astype(inputs[0], mx::float32, s), mx::astype(inputs[1], mx::float32, s),
                                 inputs[2], inputs[3], false, s);
    return {mx::astype(product, mx::promote_types(inputs[0].dtype(), inputs[1].dtype()), s)};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& out = outputs[0];
    allocate(out);
    if (out.size() == 0) {
      return;
    }
    const auto &a = inputs[0], &b = inputs[1];
    int64_t m = a.shape(-2), k = a.shape(-1), n = b.shape(-1), pairs = inputs[2].size();
    Matrix left = matrix_of(a), right = matrix_of(b);
    RowMap left_at(a, 2), right_at(b, 2), lhs_at(inputs[2], 0), rhs_at(inputs[3], 0);
    const auto* lhs = inputs[2].data<uint32_t>();
    const auto* rhs = inputs[3].data<uint32_t>();
    void* to = out.data<void>();
    Float type = float_of(out.dtype());
    int64_t n_left = left_at.rows(), n_right = right_at.rows();
    launch(stream(), [=] {
      // Pairs in order of the matrix they need, so that each is read once.
      std::vector<int64_t> order(static_cast<size_t>(pairs));
      std::vector<uint32_t> which(order.size());
      for (int64_t i = 0; i < pairs; i++) {
        order[i] = i;
        which[i] = rhs[rhs_at(i)];
        if (which[i] >= n_right || lhs[lhs_at(i)] >= n_left) {
          throw std::invalid_argument("gather_mm: an index lies beyond the matrices");
        }
      }
      std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return which[x] < which[y]; });
      through_f32(to, type, pairs * m * n, [&](float* c) {
        std::vector<float> rows, results;
        for (size_t first = 0; first < order.size();) {
          size_t last = first;
          while (last < order.size() && which[order[last]] == which[order[first]]) {
            last++;
          }
          Matrix w = right.at(right_at(which[order[first]]));
          auto count = static_cast<int64_t>(last - first);
          if (count == 1) {
            int64_t i = order[first];
            matmul(c + i * m * n, n, left.at(left_at(lhs[lhs_at(i)])), w, nullptr, m, n, k);
          } else {
            rows.resize(static_cast<size_t>(count * m * k));
            results.resize(static_cast<size_t>(count * m * n));
            parallel_ranges(count, grain_for(count, static_cast<double>(m * k), 16384), [&](int64_t r0, int64_t r1) {
              for (int64_t r = r0; r < r1; r++) {
                Matrix from = left.at(left_at(lhs[lhs_at(order[first + r])]));
                for (int64_t i = 0; i < m; i++) {
                  float* row = rows.data() + (r * m + i) * k;
                  const void* at = from.at(i * from.row_stride).data;
                  if (from.column_stride == 1) {
                    ops().to_f32(row, at, from.type, k);
                  } else {
                    for (int64_t j = 0; j < k; j++) {
                      ops().to_f32(row + j, offset(at, from.type, j * from.column_stride), from.type, 1);
                    }
                  }
                }
              }
            });
            matmul(results.data(), n, Matrix{rows.data(), Float::f32, k, 1}, w, nullptr, count * m, n, k);
            parallel_ranges(count, grain_for(count, static_cast<double>(m * n), 16384), [&](int64_t r0, int64_t r1) {
              for (int64_t r = r0; r < r1; r++) {
                std::copy_n(results.data() + r * m * n, m * n, c + order[first + r] * m * n);
              }
            });
          }
          first = last;
        }
      });
    });
  }
};

} // namespace

mx::array dense_matmul(const mx::array& a, const mx::array& b, mx::StreamOrDevice s) {
  if (!covered(a, b, s)) {
    return mx::matmul(a, b, s);
  }
  return make_matmul(a, b, std::nullopt, mx::to_stream(s));
}

mx::array dense_addmm(const mx::array& c, const mx::array& a, const mx::array& b, float alpha, float beta,
                      mx::StreamOrDevice s) {
  if (!covered(a, b, s) || !is_float(c.dtype())) {
    return mx::addmm(c, a, b, alpha, beta, s);
  }
  mx::Stream stream = mx::to_stream(s);
  mx::Dtype dtype = mx::promote_types(mx::promote_types(a.dtype(), b.dtype()), c.dtype());
  if (c.ndim() == 1 && c.shape(0) == b.shape(-1) && alpha == 1 && beta == 1) {
    return make_matmul(a, b, c, stream);
  }
  auto product = make_matmul(a, b, std::nullopt, stream);
  if (alpha != 1) {
    product = mx::multiply(product, mx::array(alpha, product.dtype()), stream);
  }
  auto addend = beta == 1 ? c : mx::multiply(c, mx::array(beta, c.dtype()), stream);
  return mx::astype(mx::add(addend, product, stream), dtype, stream);
}

mx::array dense_gather_mm(const mx::array& a_in, const mx::array& b_in, const std::optional<mx::array>& lhs_in,
                          const std::optional<mx::array>& rhs_in, bool sorted_indices, mx::StreamOrDevice s) {
  auto plain_index = [](const std::optional<mx::array>& i) { return !i || mx::issubdtype(i->dtype(), mx::integer); };
  if (!covered(a_in, b_in, s) || (!lhs_in && !rhs_in) || !plain_index(lhs_in) || !plain_index(rhs_in)) {
    return mx::gather_mm(a_in, b_in, lhs_in, rhs_in, sorted_indices, s);
  }
  mx::Stream stream = mx::to_stream(s);
  // Without indices each matrix of a batch is taken once, in order.
  auto all_of = [&](const mx::array& x) {
    mx::Shape batch(x.shape().begin(), x.shape().end() - 2);
    int count = 1;
    for (int size : batch) {
      count *= size;
    }
    return mx::reshape(mx::arange(0, count, 1, mx::uint32, stream), batch, stream);
  };
  auto lhs = mx::astype(lhs_in ? *lhs_in : all_of(a_in), mx::uint32, stream);
  auto rhs = mx::astype(rhs_in ? *rhs_in : all_of(b_in), mx::uint32, stream);
  if (lhs.shape() != rhs.shape()) {
    auto pair = mx::broadcast_arrays({lhs, rhs}, stream);
    lhs = pair[0];
    rhs = pair[1];
  }
  mx::Shape shape = lhs.shape();
  shape.push_back(a_in.shape(-2));
  shape.push_back(b_in.shape(-1));
  return mx::array(shape, mx::promote_types(a_in.dtype(), b_in.dtype()), std::make_shared<GatherMatmul>(stream),
                   {a_in, b_in, lhs, rhs});
}

} // namespace edger1
