#include <algorithm>
#include <memory>

#include "rows.h"

namespace edger1 {
namespace {

class Softmax : public DensePrimitive {
 public:
  Softmax(mx::Stream s, bool causal) : DensePrimitive(s), causal_(causal) {}

  const char* name() const override {
    return "EdgeR1Softmax";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return causal_ == static_cast<const Softmax&>(other).causal_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    mx::Stream s = stream();
    mx::array x = in[0];
    if (causal_) {
      int length = x.shape(-2), keys = x.shape(-1);
      auto row = mx::expand_dims(mx::arange(keys - length, keys, s), 1, s), column = mx::arange(keys, s);
      x = mx::where(mx::greater_equal(row, column, s), x, mx::array(-3.4028234663852886e38f), s);
    }
    return {mx::softmax(x, -1, true, s)};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate_or_reuse(inputs[0], outputs[0]);
    Rows x(inputs[0]);
    OutRows out(outputs[0]);
    int length = causal_ ? inputs[0].shape(-2) : 0;
    launch(stream(), [=] {
      int n = x.n;
      parallel_ranges(x.map.rows(), grain_for(x.map.rows(), 3.0 * n, 16384), [&](int64_t begin, int64_t end) {
        auto* scratch = static_cast<float*>(thread_scratch(0, sizeof(float) * 2 * static_cast<size_t>(n)));
        for (int64_t r = begin; r < end; r++) {
          float* to = out.place(r, scratch);
          int seen = length ? n - length + static_cast<int>(r % length) + 1 : n;
          ops().softmax(to, x.fetch(r, scratch + n), seen);
          std::fill(to + seen, to + n, 0.0f);
          out.finish(r, to);
        }
      });
    });
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>&, const std::vector<mx::array>& cotangents,
                             const std::vector<int>&, const std::vector<mx::array>& outputs) override {
    return {softmax_vjp(outputs[0], cotangents[0], stream())};
  }

 private:
  bool causal_;
};

class SoftmaxVjp : public DensePrimitive {
 public:
  using DensePrimitive::DensePrimitive;

  const char* name() const override {
    return "EdgeR1SoftmaxVjp";
  }
  bool is_equivalent(const mx::Primitive&) const override {
    return true;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    mx::Stream s = stream();
    auto product = mx::multiply(in[0], in[1], s);
    return {mx::subtract(product, mx::multiply(in[0], mx::sum(product, -1, true, s), s), s)};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    Rows y(inputs[0]), dy(inputs[1]);
    OutRows out(outputs[0]);
    launch(stream(), [=] {
      int n = y.n;
      parallel_ranges(y.map.rows(), grain_for(y.map.rows(), n, 16384), [&](int64_t begin, int64_t end) {
        auto* scratch = static_cast<float*>(thread_scratch(0, sizeof(float) * 3 * static_cast<size_t>(n)));
        for (int64_t r = begin; r < end; r++) {
          float* to = out.place(r, scratch);
          ops().softmax_vjp(to, y.fetch(r, scratch + n), dy.fetch(r, scratch + 2 * n), n);
          out.finish(r, to);
        }
      });
    });
  }
};

class LogSumExp : public DensePrimitive {
 public:
  using DensePrimitive::DensePrimitive;

  const char* name() const override {
    return "EdgeR1LogSumExp";
  }
  bool is_equivalent(const mx::Primitive&) const override {
    return true;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape[shape.size() - 1] = 1;
    return {shape};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    return {mx::logsumexp(in[0], -1, true, stream())};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    Rows x(inputs[0]);
    OutRows out(outputs[0]);
    launch(stream(), [=] {
      int n = x.n;
      parallel_ranges(x.map.rows(), grain_for(x.map.rows(), 2.0 * n, 16384), [&](int64_t begin, int64_t end) {
        auto* scratch = static_cast<float*>(thread_scratch(0, sizeof(float) * static_cast<size_t>(n)));
        for (int64_t r = begin; r < end; r++) {
          float found = ops().log_sum_exp(x.fetch(r, scratch), n);
          float* to = out.place(r, &found);
          *to = found;
          out.finish(r, to);
        }
      });
    });
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>&, const std::vector<mx::array>&) override {
    return {mx::multiply(cotangents[0], softmax(primals[0], -1, true, stream()), stream())};
  }
};

class ArgMax : public DensePrimitive {
 public:
  using DensePrimitive::DensePrimitive;

  const char* name() const override {
    return "EdgeR1ArgMax";
  }
  bool is_equivalent(const mx::Primitive&) const override {
    return true;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape[shape.size() - 1] = 1;
    return {shape};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    return {mx::argmax(in[0], -1, true, stream())};
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>&,
                             const std::vector<int>&, const std::vector<mx::array>&) override {
    return {mx::zeros_like(primals[0], stream())};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    Rows x(inputs[0]);
    auto* out = outputs[0].data<uint32_t>();
    launch(stream(), [=] {
      int n = x.n;
      parallel_ranges(x.map.rows(), grain_for(x.map.rows(), n, 32768), [&](int64_t begin, int64_t end) {
        auto* scratch = static_cast<float*>(thread_scratch(0, sizeof(float) * static_cast<size_t>(n)));
        for (int64_t r = begin; r < end; r++) {
          out[r] = static_cast<uint32_t>(ops().argmax(x.fetch(r, scratch), n));
        }
      });
    });
  }
};

bool is_last(int axis, const mx::array& x) {
  return axis == -1 || axis == static_cast<int>(x.ndim()) - 1;
}
bool is_last(const Axes& axis, const mx::array& x) {
  if (const int* one = std::get_if<int>(&axis)) {
    return is_last(*one, x);
  }
  const auto* many = std::get_if<std::vector<int>>(&axis);
  return many && many->size() == 1 && is_last(many->front(), x);
}

bool covered(const mx::array& x, const mx::StreamOrDevice& s) {
  return on_cpu(s) && is_float(x.dtype()) && x.ndim() >= 1 && x.ndim() <= RowMap::kMaxAxes && x.size() > 0;
}

mx::array reduced(const mx::array& x, mx::Dtype dtype, std::shared_ptr<CpuPrimitive> primitive, bool keepdims) {
  mx::Shape shape = x.shape();
  shape[shape.size() - 1] = 1;
  mx::Stream s = primitive->stream();
  mx::array out(shape, dtype, std::move(primitive), {x});
  return keepdims ? out : mx::squeeze(out, -1, s);
}

std::vector<int> all_axes(const Axes& axis, const mx::array& x) {
  if (const int* one = std::get_if<int>(&axis)) {
    return {*one};
  }
  if (const auto* many = std::get_if<std::vector<int>>(&axis)) {
    return *many;
  }
  std::vector<int> axes(x.ndim());
  for (size_t i = 0; i < axes.size(); i++) {
    axes[i] = static_cast<int>(i);
  }
  return axes;
}

} // namespace

mx::array softmax(const mx::array& x, const Axes& axis, bool precise, mx::StreamOrDevice s) {
  if (!covered(x, s) || !is_last(axis, x)) {
    return mx::softmax(x, all_axes(axis, x), precise, s);
  }
  return mx::array(x.shape(), x.dtype(), std::make_shared<Softmax>(mx::to_stream(s), false), {x});
}

mx::array causal_softmax(const mx::array& x, mx::Stream s) {
  return mx::array(x.shape(), x.dtype(), std::make_shared<Softmax>(s, true), {x});
}

mx::array softmax_vjp(const mx::array& y, const mx::array& dy, mx::Stream s) {
  return mx::array(y.shape(), y.dtype(), std::make_shared<SoftmaxVjp>(s), {y, dy});
}

mx::array logsumexp(const mx::array& x, const Axes& axis, bool keepdims, mx::StreamOrDevice s) {
  if (!covered(x, s) || !is_last(axis, x)) {
    return mx::logsumexp(x, all_axes(axis, x), keepdims, s);
  }
  return reduced(x, x.dtype(), std::make_shared<LogSumExp>(mx::to_stream(s)), keepdims);
}

mx::array argmax(const mx::array& x, std::optional<int> axis, bool keepdims, mx::StreamOrDevice s) {
  if (!axis) {
    return mx::argmax(x, keepdims, s);
  }
  if (!covered(x, s) || !is_last(*axis, x)) {
    return mx::argmax(x, *axis, keepdims, s);
  }
  return reduced(x, mx::uint32, std::make_shared<ArgMax>(mx::to_stream(s)), keepdims);
}

} // namespace edger1
