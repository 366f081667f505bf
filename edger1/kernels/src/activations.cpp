#include <cmath>
#include <memory>

#include "rows.h"

namespace edger1 {
namespace {

mx::array scalar(float value, const mx::array& like) {
  return mx::array(value, like.dtype());
}

// The activations in MLX's own operations.
mx::array plain(Unary op, const mx::array& x, mx::Stream s) {
  switch (op) {
    case Unary::exp:
      return mx::exp(x, s);
    case Unary::sigmoid:
      return mx::sigmoid(x, s);
    case Unary::silu:
      return mx::multiply(x, mx::sigmoid(x, s), s);
    case Unary::tanh:
      return mx::tanh(x, s);
    case Unary::gelu: {
      auto inner = mx::erf(mx::divide(x, scalar(std::sqrt(2.0f), x), s), s);
      return mx::divide(mx::multiply(x, mx::add(scalar(1, x), inner, s), s), scalar(2, x), s);
    }
    case Unary::gelu_tanh: {
      auto cube = mx::multiply(scalar(0.044715f, x), mx::power(x, scalar(3, x), s), s);
      auto inner = mx::multiply(scalar(0.79788456f, x), mx::add(x, cube, s), s);
      auto half = mx::multiply(scalar(0.5f, x), x, s);
      return mx::multiply(half, mx::add(scalar(1, x), mx::tanh(inner, s), s), s);
    }
    case Unary::gelu_fast:
      return mx::multiply(x, mx::sigmoid(mx::multiply(scalar(1.702f, x), x, s), s), s);
  }
  return x;
}

mx::array plain(Gate op, const mx::array& gate, const mx::array& x, float alpha, float limit, mx::Stream s) {
  if (op == Gate::swiglu_oai) {
    auto g = mx::minimum(gate, scalar(limit, gate), s);
    auto u = mx::clip(x, scalar(-limit, x), scalar(limit, x), s);
    auto glu = mx::multiply(g, mx::sigmoid(mx::multiply(scalar(alpha, g), g, s), s), s);
    return mx::multiply(mx::add(u, scalar(1, u), s), glu, s);
  }
  Unary f = op == Gate::swiglu ? Unary::silu : op == Gate::geglu ? Unary::gelu : Unary::gelu_tanh;
  return mx::multiply(plain(f, gate, s), x, s);
}

// Runs `body(outputs..., inputs..., n)` over matching pieces: one long run where every array is dense in one layout, rows
// otherwise. All arrays have one shape.
struct Layout {
  bool flat = true;
  std::vector<Rows> in;
  std::vector<OutRows> out;
  int64_t size = 0;
};

Layout lay_out(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  Layout layout;
  const auto& first = inputs[0];
  for (const auto& a : inputs) {
    layout.flat &= a.flags().contiguous && a.data_size() == a.size() && a.strides() == first.strides();
  }
  for (auto& out : outputs) {
    if (layout.flat) {
      bool reuse = outputs.size() == 1 && first.is_donatable() && first.dtype() == out.dtype();
      if (reuse) {
        out.copy_shared_buffer(first);
      } else {
        out.set_data(mx::allocator::malloc(out.nbytes()), first.data_size(), first.strides(), first.flags());
      }
    } else {
      allocate(out);
    }
    layout.out.emplace_back(out);
  }
  for (const auto& a : inputs) {
    layout.in.emplace_back(a);
  }
  layout.size = static_cast<int64_t>(first.size());
  return layout;
}

// Calls body(float* const* out, const float* const* in, n) on float pieces; `cost` is that of an element.
template <class Body>
void run(const Layout& layout, double cost, Body body) {
  size_t n_in = layout.in.size(), n_out = layout.out.size();
  constexpr int64_t kPiece = 1024;
  if (layout.flat) {
    parallel_ranges(layout.size, grain_for(layout.size, cost, 16384, kPiece), [&](int64_t begin, int64_t end) {
      auto* scratch = static_cast<float*>(thread_scratch(0, sizeof(float) * kPiece * (n_in + n_out)));
      bool all_f32 = true;
      for (const auto& a : layout.in) {
        all_f32 &= a.type == Float::f32;
      }
      for (const auto& a : layout.out) {
        all_f32 &= a.type == Float::f32;
      }
      int64_t step = all_f32 ? end - begin : kPiece;
      for (int64_t i = begin; i < end; i += step) {
        int64_t n = std::min(step, end - i);
        const float* in[4];
        float* out[2];
        for (size_t a = 0; a < n_in; a++) {
          const void* at = offset(layout.in[a].data, layout.in[a].type, i);
          if (layout.in[a].type == Float::f32) {
            in[a] = static_cast<const float*>(at);
          } else {
            ops().to_f32(scratch + a * kPiece, at, layout.in[a].type, n);
            in[a] = scratch + a * kPiece;
          }
        }
        for (size_t a = 0; a < n_out; a++) {
          out[a] = layout.out[a].type == Float::f32 ? static_cast<float*>(layout.out[a].data) + i
                                                    : scratch + (n_in + a) * kPiece;
        }
        body(out, in, n);
        for (size_t a = 0; a < n_out; a++) {
          if (layout.out[a].type != Float::f32) {
            ops().from_f32(offset(layout.out[a].data, layout.out[a].type, i), layout.out[a].type, out[a], n);
          }
        }
      }
    });
    return;
  }
  int n = layout.in[0].n;
  int64_t rows = layout.in[0].map.rows();
  parallel_ranges(rows, grain_for(rows, cost * n, 16384), [&](int64_t begin, int64_t end) {
    auto* scratch = static_cast<float*>(thread_scratch(0, sizeof(float) * static_cast<size_t>(n) * (n_in + n_out)));
    for (int64_t r = begin; r < end; r++) {
      const float* in[4];
      float* out[2];
      for (size_t a = 0; a < n_in; a++) {
        in[a] = layout.in[a].fetch(r, scratch + a * n);
      }
      for (size_t a = 0; a < n_out; a++) {
        out[a] = layout.out[a].place(r, scratch + (n_in + a) * n);
      }
      body(out, in, n);
      for (size_t a = 0; a < n_out; a++) {
        layout.out[a].finish(r, out[a]);
      }
    }
  });
}

constexpr double kExpCost = 4;

class UnaryVjp : public CpuPrimitive {
 public:
  UnaryVjp(mx::Stream s, Unary op) : CpuPrimitive(s), op_(op) {}
  const char* name() const override {
    return "EdgeR1ActivationVjp";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    launch(stream(), [op = op_, layout = lay_out(inputs, outputs)] {
      run(layout, kExpCost, [&](float* const* out, const float* const* in, int64_t n) {
        ops().unary_vjp(op, out[0], in[0], in[1], n);
      });
    });
  }

 private:
  Unary op_;
};

class Activation : public DensePrimitive {
 public:
  Activation(mx::Stream s, Unary op) : DensePrimitive(s), op_(op) {}
  const char* name() const override {
    return "EdgeR1Activation";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return op_ == static_cast<const Activation&>(other).op_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    return {plain(op_, in[0], stream())};
  }
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    launch(stream(), [op = op_, layout = lay_out(inputs, outputs)] {
      run(layout, kExpCost, [&](float* const* out, const float* const* in, int64_t n) { ops().unary(op, out[0], in[0], n); });
    });
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>&, const std::vector<mx::array>&) override {
    return {mx::array(primals[0].shape(), primals[0].dtype(), std::make_shared<UnaryVjp>(stream(), op_),
                      {primals[0], cotangents[0]})};
  }

 private:
  Unary op_;
};

struct GateKind {
  Gate op;
  float alpha, limit;
  bool operator==(const GateKind&) const = default;
};

class GatedVjp : public CpuPrimitive {
 public:
  GatedVjp(mx::Stream s, GateKind kind) : CpuPrimitive(s), kind_(kind) {}
  const char* name() const override {
    return "EdgeR1GatedVjp";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape(), inputs[1].shape()};
  }
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    launch(stream(), [kind = kind_, layout = lay_out(inputs, outputs)] {
      run(layout, 2 * kExpCost, [&](float* const* out, const float* const* in, int64_t n) {
        ops().gate_vjp(kind.op, out[0], out[1], in[0], in[1], in[2], n, kind.alpha, kind.limit);
      });
    });
  }

 private:
  GateKind kind_;
};

class Gated : public DensePrimitive {
 public:
  Gated(mx::Stream s, GateKind kind) : DensePrimitive(s), kind_(kind) {}
  const char* name() const override {
    return "EdgeR1Gated";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return kind_ == static_cast<const Gated&>(other).kind_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    return {plain(kind_.op, in[0], in[1], kind_.alpha, kind_.limit, stream())};
  }
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    launch(stream(), [kind = kind_, layout = lay_out(inputs, outputs)] {
      run(layout, kExpCost, [&](float* const* out, const float* const* in, int64_t n) {
        ops().gate(kind.op, out[0], in[0], in[1], n, kind.alpha, kind.limit);
      });
    });
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    auto gradients = mx::array::make_arrays({primals[0].shape(), primals[1].shape()},
                                            {primals[0].dtype(), primals[1].dtype()},
                                            std::make_shared<GatedVjp>(stream(), kind_),
                                            {primals[0], primals[1], cotangents[0]});
    std::vector<mx::array> chosen;
    for (int arg : argnums) {
      chosen.push_back(gradients[arg]);
    }
    return chosen;
  }

 private:
  GateKind kind_;
};

bool covered(const mx::array& x, const mx::StreamOrDevice& s) {
  return on_cpu(s) && is_float(x.dtype()) && x.ndim() <= RowMap::kMaxAxes && x.size() > 0;
}

} // namespace

mx::array activation(Unary op, const mx::array& x, mx::StreamOrDevice s) {
  if (!covered(x, s)) {
    return plain(op, x, mx::to_stream(s));
  }
  return mx::array(x.shape(), x.dtype(), std::make_shared<Activation>(mx::to_stream(s), op), {x});
}

mx::array gated(Gate op, const mx::array& gate, const mx::array& x, float alpha, float limit, mx::StreamOrDevice s) {
  mx::Stream stream = mx::to_stream(s);
  if (!covered(gate, s) || !covered(x, s) || gate.shape() != x.shape() || gate.dtype() != x.dtype()) {
    return plain(op, gate, x, alpha, limit, stream);
  }
  return mx::array(x.shape(), x.dtype(), std::make_shared<Gated>(stream, GateKind{op, alpha, limit}), {gate, x});
}

} // namespace edger1
