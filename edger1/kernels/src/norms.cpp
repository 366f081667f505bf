#include <cmath>
#include <memory>

#include "mlx/fast.h"
#include "rows.h"

namespace edger1 {
namespace {

// A weight or bias of n elements as floats, in `scratch` if it is not that already.
const float* plain(const Rows& v, bool present, std::vector<float>& scratch) {
  if (!present) {
    return nullptr;
  }
  scratch.resize(static_cast<size_t>(v.n));
  return v.fetch(0, scratch.data());
}

// Inputs x [..., N] and, if weighted, w [N]; dx and dw of rms_norm follow from inputs x, w, dy.
class RmsNormVjp : public CpuPrimitive {
 public:
  RmsNormVjp(mx::Stream s, float eps, bool weighted) : CpuPrimitive(s), eps_(eps), weighted_(weighted) {}

  const char* name() const override {
    return "EdgeR1RmsNormVjp";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    if (weighted_) {
      return {inputs[0].shape(), inputs[1].shape()};
    }
    return {inputs[0].shape()};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    for (auto& out : outputs) {
      allocate(out);
    }
    Rows x(inputs[0]), w, dy(inputs.back());
    if (weighted_) {
      w = Rows(inputs[1]);
    }
    OutRows dx(outputs[0]);
    float* dw = weighted_ ? outputs[1].data<float>() : nullptr;
    bool weighted = weighted_;
    float eps = eps_;
    launch(stream(), [=] {
      std::vector<float> weight_copy;
      const float* weight = plain(w, weighted, weight_copy);
      int n = x.n;
      int64_t rows = x.map.rows();
      // Partial sums of dw per range of rows; the ranges depend on the shape alone, so the result does too.
      int64_t grain = std::max<int64_t>(64, (rows + 31) / 32), ranges = rows == 0 ? 0 : (rows + grain - 1) / grain;
      std::vector<float> partial(dw ? static_cast<size_t>(ranges * n) : 0);
      parallel_ranges(rows, grain, [&](int64_t begin, int64_t end) {
        auto* scratch = static_cast<float*>(thread_scratch(0, sizeof(float) * 3 * static_cast<size_t>(n)));
        float* sums = dw ? partial.data() + begin / grain * n : nullptr;
        for (int64_t r = begin; r < end; r++) {
          float* to = dx.place(r, scratch);
          ops().rms_norm_vjp(to, sums, x.fetch(r, scratch + n), weight, dy.fetch(r, scratch + 2 * n), n, eps);
          dx.finish(r, to);
        }
      });
      if (dw) {
        std::fill(dw, dw + n, 0.0f);
        for (int64_t i = 0; i < ranges; i++) {
          ops().blend_row(dw, 1, partial.data() + i * n, 1, n);
        }
      }
    });
  }

 private:
  float eps_;
  bool weighted_;
};

class RmsNorm : public DensePrimitive {
 public:
  RmsNorm(mx::Stream s, float eps) : DensePrimitive(s), eps_(eps) {}

  const char* name() const override {
    return "EdgeR1RmsNorm";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return eps_ == static_cast<const RmsNorm&>(other).eps_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    return {mx::fast::rms_norm(in[0], in.size() > 1 ? std::optional(in[1]) : std::nullopt, eps_, stream())};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate_or_reuse(inputs[0], outputs[0]);
    bool weighted = inputs.size() > 1;
    Rows x(inputs[0]), w;
    if (weighted) {
      w = Rows(inputs[1]);
    }
    OutRows out(outputs[0]);
    float eps = eps_;
    launch(stream(), [=] {
      std::vector<float> weight_copy;
      const float* weight = plain(w, weighted, weight_copy);
      int n = x.n;
      parallel_ranges(x.map.rows(), grain_for(x.map.rows(), n, 16384), [&](int64_t begin, int64_t end) {
        auto* scratch = static_cast<float*>(thread_scratch(0, sizeof(float) * 2 * static_cast<size_t>(n)));
        for (int64_t r = begin; r < end; r++) {
          float* to = out.place(r, scratch);
          ops().rms_norm(to, x.fetch(r, scratch + n), weight, n, eps);
          out.finish(r, to);
        }
      });
    });
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    bool weighted = primals.size() > 1;
    std::vector<mx::array> inputs = primals;
    inputs.push_back(cotangents[0]);
    auto primitive = std::make_shared<RmsNormVjp>(stream(), eps_, weighted);
    std::vector<mx::Shape> shapes{primals[0].shape()};
    std::vector<mx::Dtype> dtypes{primals[0].dtype()};
    if (weighted) {
      shapes.push_back(primals[1].shape());
      dtypes.push_back(mx::float32);
    }
    auto gradients = mx::array::make_arrays(std::move(shapes), dtypes, primitive, inputs);
    std::vector<mx::array> chosen;
    for (int arg : argnums) {
      chosen.push_back(mx::astype(gradients[arg], primals[arg].dtype(), stream()));
    }
    return chosen;
  }

 private:
  float eps_;
};

// dx [..., N], dw [N] and db [N] (float32) of layer_norm from inputs x, dy and, if weighted, w. A layer norm is an RMS norm
// of the centred row, and the gradient through the centring is to be centred itself.
class LayerNormVjp : public CpuPrimitive {
 public:
  LayerNormVjp(mx::Stream s, float eps, bool weighted) : CpuPrimitive(s), eps_(eps), weighted_(weighted) {}

  const char* name() const override {
    return "EdgeR1LayerNormVjp";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape row{inputs[0].shape(-1)};
    return {inputs[0].shape(), row, row};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    for (auto& out : outputs) {
      allocate(out);
    }
    Rows x(inputs[0]), dy(inputs[1]), w;
    if (weighted_) {
      w = Rows(inputs[2]);
    }
    OutRows dx(outputs[0]);
    float *dw = outputs[1].data<float>(), *db = outputs[2].data<float>();
    launch(stream(), [=, weighted = weighted_, eps = eps_] {
      int n = x.n;
      // Without a weight its gradient is of no use, but a weight of ones must stand in for it to be summed up.
      std::vector<float> weight_copy, ones(static_cast<size_t>(n), 1.0f);
      const float* weight = weighted ? plain(w, weighted, weight_copy) : ones.data();
      int64_t rows = x.map.rows(), grain = std::max<int64_t>(64, (rows + 31) / 32), ranges = (rows + grain - 1) / grain;
      std::vector<float> partial(static_cast<size_t>(2 * ranges * n));
      parallel_ranges(rows, grain, [&](int64_t begin, int64_t end) {
        auto* scratch = static_cast<float*>(thread_scratch(0, sizeof(float) * 4 * static_cast<size_t>(n)));
        float *centred = scratch + n, *sums = partial.data() + 2 * (begin / grain) * n;
        for (int64_t r = begin; r < end; r++) {
          float* to = dx.place(r, scratch);
          const float *row = x.fetch(r, scratch + 2 * n), *above = dy.fetch(r, scratch + 3 * n);
          std::copy_n(row, n, centred);
          centre(centred, ones.data(), n);
          ops().rms_norm_vjp(to, sums, centred, weight, above, n, eps);
          centre(to, ones.data(), n);
          ops().blend_row(sums + n, 1, above, 1, n);
          dx.finish(r, to);
        }
      });
      std::fill(dw, dw + n, 0.0f);
      std::fill(db, db + n, 0.0f);
      for (int64_t i = 0; i < ranges; i++) {
        ops().blend_row(dw, 1, partial.data() + 2 * i * n, 1, n);
        ops().blend_row(db, 1, partial.data() + (2 * i + 1) * n, 1, n);
      }
    });
  }

 private:
  static void centre(float* x, const float* ones, int n) {
    constexpr int kSums = 16;
    float sums[kSums] = {};
    int i = 0;
    for (; i + kSums <= n; i += kSums) {
      for (int j = 0; j < kSums; j++) {
        sums[j] += x[i + j];
      }
    }
    float sum = 0;
    for (; i < n; i++) {
      sum += x[i];
    }
    for (float part : sums) {
      sum += part;
    }
    ops().blend_row(x, 1, ones, -sum / static_cast<float>(n), n);
  }

  float eps_;
  bool weighted_;
};

// Inputs x [..., N], then w [N] and b [N] where present.
class LayerNorm : public DensePrimitive {
 public:
  LayerNorm(mx::Stream s, float eps, bool weighted, bool biased)
      : DensePrimitive(s), eps_(eps), weighted_(weighted), biased_(biased) {}

  const char* name() const override {
    return "EdgeR1LayerNorm";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    return {mx::fast::layer_norm(in[0], weighted_ ? std::optional(in[1]) : std::nullopt,
                                 biased_ ? std::optional(in.back()) : std::nullopt, eps_, stream())};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    bool weighted = weighted_, biased = biased_;
    Rows x(inputs[0]), w, b;
    if (weighted) {
      w = Rows(inputs[1]);
    }
    if (biased) {
      b = Rows(inputs.back());
    }
    OutRows out(outputs[0]);
    float eps = eps_;
    launch(stream(), [=] {
      std::vector<float> weight_copy, bias_copy;
      const float *weight = plain(w, weighted, weight_copy), *bias = plain(b, biased, bias_copy);
      int n = x.n;
      parallel_ranges(x.map.rows(), grain_for(x.map.rows(), 2 * n, 16384), [&](int64_t begin, int64_t end) {
        auto* scratch = static_cast<float*>(thread_scratch(0, sizeof(float) * 2 * static_cast<size_t>(n)));
        for (int64_t r = begin; r < end; r++) {
          float* to = out.place(r, scratch);
          ops().layer_norm(to, x.fetch(r, scratch + n), weight, bias, n, eps);
          out.finish(r, to);
        }
      });
    });
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    const auto& x = primals[0];
    std::vector<mx::array> inputs{x, cotangents[0]};
    if (weighted_) {
      inputs.push_back(primals[1]);
    }
    mx::Shape row{x.shape(-1)};
    auto gradients = mx::array::make_arrays({x.shape(), row, row}, {x.dtype(), mx::float32, mx::float32},
                                            std::make_shared<LayerNormVjp>(stream(), eps_, weighted_), inputs);
    std::vector<mx::array> chosen;
    for (int arg : argnums) {
      // Without a weight the bias is argument 1.
      int which = arg > 0 && !weighted_ ? 2 : arg;
      chosen.push_back(mx::astype(gradients[which], primals[arg].dtype(), stream()));
    }
    return chosen;
  }

 private:
  float eps_;
  bool weighted_, biased_;
};

bool covered(const mx::array& x, const mx::StreamOrDevice& s) {
  return on_cpu(s) && is_float(x.dtype()) && x.ndim() >= 1 && x.ndim() <= RowMap::kMaxAxes && x.size() > 0;
}
bool fits(const std::optional<mx::array>& v, const mx::array& x) {
  return !v || (v->ndim() == 1 && v->shape(0) == x.shape(-1) && is_float(v->dtype()));
}

} // namespace

mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& weight, float eps, mx::StreamOrDevice s) {
  if (!covered(x, s) || !fits(weight, x)) {
    return mx::fast::rms_norm(x, weight, eps, s);
  }
  std::vector<mx::array> inputs{x};
  mx::Dtype dtype = x.dtype();
  if (weight) {
    inputs.push_back(*weight);
    dtype = mx::promote_types(dtype, weight->dtype());
  }
  return mx::array(x.shape(), dtype, std::make_shared<RmsNorm>(mx::to_stream(s), eps), std::move(inputs));
}

mx::array layer_norm(const mx::array& x, const std::optional<mx::array>& weight, const std::optional<mx::array>& bias,
                     float eps, mx::StreamOrDevice s) {
  if (!covered(x, s) || !fits(weight, x) || !fits(bias, x)) {
    return mx::fast::layer_norm(x, weight, bias, eps, s);
  }
  std::vector<mx::array> inputs{x};
  mx::Dtype dtype = x.dtype();
  for (const auto& v : {weight, bias}) {
    if (v) {
      inputs.push_back(*v);
      dtype = mx::promote_types(dtype, v->dtype());
    }
  }
  auto primitive = std::make_shared<LayerNorm>(mx::to_stream(s), eps, weight.has_value(), bias.has_value());
  return mx::array(x.shape(), dtype, primitive, std::move(inputs));
}

} // namespace edger1
