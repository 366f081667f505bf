// The routed experts of a MoE layer, forwards and backwards, without a row being written for each choice.
//
// Tokens go through in chunks of a fixed size: a chunk's choices are ordered by expert, each expert takes its rows, and its
// results are added to the chunk's tokens while those are in the cache. Backwards a second pass, over experts, sums the
// weights' gradients from what the first left behind. The intermediate rows are computed again and not kept.
#include <numeric>

#include "train_common.h"
#include "train_ops.h"

namespace edger1 {
namespace {

constexpr int kBlockRows = 256;

struct Sizes {
  int64_t tokens, chosen, experts, dim, inner;

  // Fixed by the tokens alone, so that sums do not depend on the threads.
  int64_t chunk() const {
    return std::clamp<int64_t>((tokens / 4 + 31) / 32 * 32, 64, 2048);
  }
  int64_t chunks() const {
    return (tokens + chunk() - 1) / chunk();
  }
};

// The choices of a chunk in the order of experts: `choice` is t * chosen + r.
struct Order {
  std::vector<int64_t> first; // experts + 1
  std::vector<uint32_t> choice;

  Order(const Sizes& s, const uint32_t* indices, int64_t t0, int64_t t1)
      : first(static_cast<size_t>(s.experts + 1)), choice(static_cast<size_t>((t1 - t0) * s.chosen)) {
    for (int64_t i = t0 * s.chosen; i < t1 * s.chosen; i++) {
      if (indices[i] >= s.experts) {
        throw std::invalid_argument("experts: an index lies beyond the experts");
      }
      first[indices[i] + 1]++;
    }
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = t0 * s.chosen; i < t1 * s.chosen; i++) {
      choice[static_cast<size_t>(next[indices[i]]++)] = static_cast<uint32_t>(i);
    }
  }
};

void gather(float* to, const float* from, const uint32_t* choice, int rows, const Sizes& s) {
  for (int i = 0; i < rows; i++) {
    std::memcpy(to + i * s.dim, from + choice[i] / s.chosen * s.dim, sizeof(float) * static_cast<size_t>(s.dim));
  }
}

struct Weights {
  const float *gate, *up, *down;

  Matrix gate_of(const Sizes& s, int64_t e) const {
    return rows_of(gate + e * s.inner * s.dim, s.dim);
  }
  Matrix up_of(const Sizes& s, int64_t e) const {
    return rows_of(up + e * s.inner * s.dim, s.dim);
  }
  Matrix down_of(const Sizes& s, int64_t e) const {
    return rows_of(down + e * s.dim * s.inner, s.inner);
  }
};

void run_forward(const GemmEngine& g, const Sizes& s, const float* x, const uint32_t* indices, const float* shares,
                 const Weights& w, float* out) {
  Carver carver;
  size_t gate_at = carver.reserve(g.b_bytes(s.dim, s.inner)), up_at = carver.reserve(g.b_bytes(s.dim, s.inner));
  size_t down_at = carver.reserve(g.b_bytes(s.inner, s.dim)), size = carver.total();
  auto* packed = static_cast<char*>(thread_scratch(1, size * static_cast<size_t>(s.experts)));
  int dim = static_cast<int>(s.dim), inner = static_cast<int>(s.inner);
  parallel_for(s.experts, [&](int64_t e) {
    char* to = packed + size * static_cast<size_t>(e);
    g.pack_b(to + gate_at, transposed(w.gate_of(s, e)), dim, inner);
    g.pack_b(to + up_at, transposed(w.up_of(s, e)), dim, inner);
    g.pack_b(to + down_at, transposed(w.down_of(s, e)), inner, dim);
  });
  parallel_for(s.chunks(), [&](int64_t chunk) {
    int64_t t0 = chunk * s.chunk(), t1 = std::min(t0 + s.chunk(), s.tokens);
    Order order(s, indices, t0, t1);
    Carver own;
    size_t rows_at = own.reserve(sizeof(float) * kBlockRows * s.dim), a_at = own.reserve(g.a_bytes(kBlockRows, std::max(s.dim, s.inner)));
    size_t g_at = own.reserve(sizeof(float) * kBlockRows * s.inner), u_at = own.reserve(sizeof(float) * kBlockRows * s.inner);
    auto* scratch = static_cast<char*>(thread_scratch(0, own.total()));
    auto* rows = reinterpret_cast<float*>(scratch + rows_at);
    auto *gates = reinterpret_cast<float*>(scratch + g_at), *ups = reinterpret_cast<float*>(scratch + u_at);
    void* a = scratch + a_at;
    std::memset(out + t0 * s.dim, 0, sizeof(float) * static_cast<size_t>((t1 - t0) * s.dim));
    for (int64_t e = 0; e < s.experts; e++) {
      const char* from = packed + size * static_cast<size_t>(e);
      for (int64_t i = order.first[e]; i < order.first[e + 1]; i += kBlockRows) {
        int count = static_cast<int>(std::min<int64_t>(kBlockRows, order.first[e + 1] - i));
        const uint32_t* choice = order.choice.data() + i;
        gather(rows, x, choice, count, s);
        g.pack_a(a, rows_of(rows, s.dim), count, dim);
        g.gemm(gates, s.inner, a, from + gate_at, count, inner, dim, false);
        g.gemm(ups, s.inner, a, from + up_at, count, inner, dim, false);
        ops().gate(Gate::swiglu, gates, gates, ups, count * s.inner, 0, 0);
        g.pack_a(a, rows_of(gates, s.inner), count, inner);
        g.gemm(rows, s.dim, a, from + down_at, count, dim, inner, false);
        for (int r = 0; r < count; r++) {
          ops().blend_row(out + choice[r] / s.chosen * s.dim, 1, rows + r * s.dim, shares[choice[r]], dim);
        }
      }
    }
  });
}

struct Gradients {
  float *x, *shares, *gate, *up, *down;
};

float dot(const float* x, const float* y, int n) {
  float found;
  ops().dot_rows(&found, 1, x, n, 1, y, Float::f32, n, n, 0, 1);
  return found;
}

void run_backward(const GemmEngine& g, const Sizes& s, const float* x, const uint32_t* indices, const float* shares,
                  const Weights& w, const float* d_out, const Gradients& to) {
  int dim = static_cast<int>(s.dim), inner = static_cast<int>(s.inner);
  int64_t stored_bytes = bytes_of(g.stored);
  Carver carver;
  size_t gate_t = carver.reserve(g.b_bytes(s.dim, s.inner)), up_t = carver.reserve(g.b_bytes(s.dim, s.inner));
  size_t down_at = carver.reserve(g.b_bytes(s.dim, s.inner));
  size_t gate_at = carver.reserve(g.b_bytes(s.inner, s.dim)), up_at = carver.reserve(g.b_bytes(s.inner, s.dim));
  size_t size = carver.total();
  Carver whole;
  size_t packed_at = whole.reserve(size * static_cast<size_t>(s.experts));
  // For each choice, in the chunks' order: gradients of gate and up, and the weighted intermediate row.
  size_t kept_at = whole.reserve(static_cast<size_t>(s.tokens * s.chosen * 3 * s.inner * stored_bytes));
  auto* base = static_cast<char*>(thread_scratch(1, whole.total()));
  char *packed = base + packed_at, *kept = base + kept_at;
  int64_t kept_row = 3 * s.inner;
  std::vector<Order> orders;
  orders.reserve(static_cast<size_t>(s.chunks()));
  for (int64_t chunk = 0; chunk < s.chunks(); chunk++) {
    orders.emplace_back(s, indices, chunk * s.chunk(), std::min((chunk + 1) * s.chunk(), s.tokens));
  }
  parallel_for(s.experts, [&](int64_t e) {
    char* p = packed + size * static_cast<size_t>(e);
    g.pack_b(p + gate_t, transposed(w.gate_of(s, e)), dim, inner);
    g.pack_b(p + up_t, transposed(w.up_of(s, e)), dim, inner);
    g.pack_b(p + down_at, w.down_of(s, e), dim, inner);
    g.pack_b(p + gate_at, w.gate_of(s, e), inner, dim);
    g.pack_b(p + up_at, w.up_of(s, e), inner, dim);
  });
  parallel_for(s.chunks(), [&](int64_t chunk) {
    int64_t t0 = chunk * s.chunk(), t1 = std::min(t0 + s.chunk(), s.tokens);
    const Order& order = orders[static_cast<size_t>(chunk)];
    Carver own;
    size_t rows_at = own.reserve(sizeof(float) * kBlockRows * s.dim), a_at = own.reserve(g.a_bytes(kBlockRows, std::max(s.dim, s.inner)));
    size_t at[6];
    for (size_t& one : at) {
      one = own.reserve(sizeof(float) * kBlockRows * s.inner);
    }
    auto* scratch = static_cast<char*>(thread_scratch(0, own.total()));
    auto* rows = reinterpret_cast<float*>(scratch + rows_at);
    float* part[6];
    for (int i = 0; i < 6; i++) {
      part[i] = reinterpret_cast<float*>(scratch + at[i]);
    }
    auto [gates, ups, d_h, h, d_gates, d_ups] = part;
    void* a = scratch + a_at;
    std::memset(to.x + t0 * s.dim, 0, sizeof(float) * static_cast<size_t>((t1 - t0) * s.dim));
    for (int64_t e = 0; e < s.experts; e++) {
      const char* p = packed + size * static_cast<size_t>(e);
      for (int64_t i = order.first[e]; i < order.first[e + 1]; i += kBlockRows) {
        int count = static_cast<int>(std::min<int64_t>(kBlockRows, order.first[e + 1] - i));
        const uint32_t* choice = order.choice.data() + i;
        gather(rows, x, choice, count, s);
        g.pack_a(a, rows_of(rows, s.dim), count, dim);
        g.gemm(gates, s.inner, a, p + gate_t, count, inner, dim, false);
        g.gemm(ups, s.inner, a, p + up_t, count, inner, dim, false);
        gather(rows, d_out, choice, count, s);
        g.pack_a(a, rows_of(rows, s.dim), count, dim);
        g.gemm(d_h, s.inner, a, p + down_at, count, inner, dim, false);
        ops().gate(Gate::swiglu, h, gates, ups, count * s.inner, 0, 0);
        char* keep = kept + (t0 * s.chosen + i) * kept_row * stored_bytes;
        for (int r = 0; r < count; r++) {
          float share = shares[choice[r]];
          to.shares[choice[r]] = dot(h + r * s.inner, d_h + r * s.inner, inner);
          ops().scale_row(h + r * s.inner, share, inner);
          ops().scale_row(d_h + r * s.inner, share, inner);
          ops().from_f32(keep + (r * kept_row + 2 * s.inner) * stored_bytes, g.stored, h + r * s.inner, s.inner);
        }
        ops().gate_vjp(Gate::swiglu, d_gates, d_ups, gates, ups, d_h, count * s.inner, 0, 0);
        for (int r = 0; r < count; r++) {
          ops().from_f32(keep + r * kept_row * stored_bytes, g.stored, d_gates + r * s.inner, s.inner);
          ops().from_f32(keep + (r * kept_row + s.inner) * stored_bytes, g.stored, d_ups + r * s.inner, s.inner);
        }
        g.pack_a(a, rows_of(d_gates, s.inner), count, inner);
        g.gemm(rows, s.dim, a, p + gate_at, count, dim, inner, false);
        g.pack_a(a, rows_of(d_ups, s.inner), count, inner);
        g.gemm(rows, s.dim, a, p + up_at, count, dim, inner, true);
        for (int r = 0; r < count; r++) {
          ops().blend_row(to.x + choice[r] / s.chosen * s.dim, 1, rows + r * s.dim, 1, dim);
        }
      }
    }
  });
  parallel_for(s.experts, [&](int64_t e) {
    Carver own;
    size_t rows_at = own.reserve(sizeof(float) * kPackedDepth * s.dim), a_at = own.reserve(g.a_bytes(s.inner, kPackedDepth));
    size_t b_at = own.reserve(g.b_bytes(kPackedDepth, s.dim)), sum_at = own.reserve(sizeof(float) * s.inner * s.dim);
    auto* scratch = static_cast<char*>(thread_scratch(0, own.total()));
    auto *rows = reinterpret_cast<float*>(scratch + rows_at), *down = reinterpret_cast<float*>(scratch + sum_at);
    void *a = scratch + a_at, *b = scratch + b_at;
    float *gate = to.gate + e * s.inner * s.dim, *up = to.up + e * s.inner * s.dim;
    bool any = false;
    for (int64_t chunk = 0; chunk < s.chunks(); chunk++) {
      const Order& order = orders[static_cast<size_t>(chunk)];
      for (int64_t i = order.first[e]; i < order.first[e + 1]; i += kPackedDepth) {
        int count = static_cast<int>(std::min<int64_t>(kPackedDepth, order.first[e + 1] - i));
        const uint32_t* choice = order.choice.data() + i;
        const char* keep = kept + (chunk * s.chunk() * s.chosen + i) * kept_row * stored_bytes;
        // Transposed: a row of the operand for each inner dimension, along k from choice to choice.
        auto columns = [&](int64_t first) {
          return Matrix{keep + first * stored_bytes, g.stored, 1, kept_row};
        };
        gather(rows, x, choice, count, s);
        g.pack_b(b, rows_of(rows, s.dim), count, dim);
        g.pack_a(a, columns(0), inner, count);
        g.gemm(gate, s.dim, a, b, inner, dim, count, any);
        g.pack_a(a, columns(s.inner), inner, count);
        g.gemm(up, s.dim, a, b, inner, dim, count, any);
        gather(rows, d_out, choice, count, s);
        g.pack_b(b, rows_of(rows, s.dim), count, dim);
        g.pack_a(a, columns(2 * s.inner), inner, count);
        g.gemm(down, s.dim, a, b, inner, dim, count, any);
        any = true;
      }
    }
    float* d_down = to.down + e * s.dim * s.inner;
    if (!any) {
      for (float* one : {gate, up, d_down}) {
        std::memset(one, 0, sizeof(float) * static_cast<size_t>(s.inner * s.dim));
      }
      return;
    }
    constexpr int64_t kSquare = 16;
    for (int64_t i = 0; i < s.inner; i += kSquare) {
      for (int64_t j = 0; j < s.dim; j++) {
        for (int64_t ii = i; ii < std::min(i + kSquare, s.inner); ii++) {
          d_down[j * s.inner + ii] = down[ii * s.dim + j];
        }
      }
    }
  });
}

class Experts : public TrainPrimitive {
 public:
  Experts(mx::Stream s, bool mixed) : TrainPrimitive(s), mixed_(mixed) {}
  const char* name() const override {
    return "EdgeR1Experts";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    Sizes s{in[0].shape(0), in[1].shape(1), in[3].shape(0), in[0].shape(1), in[3].shape(1)};
    Weights w{in[3].data<float>(), in[4].data<float>(), in[5].data<float>()};
    launch(stream(), [=, &g = gemm_engine(mixed_), x = in[0].data<float>(), i = in[1].data<uint32_t>(),
                      shares = in[2].data<float>(), to = out[0].data<float>()] { run_forward(g, s, x, i, shares, w, to); });
  }

 private:
  bool mixed_;
};

class ExpertsVjp : public TrainPrimitive {
 public:
  ExpertsVjp(mx::Stream s, bool mixed) : TrainPrimitive(s), mixed_(mixed) {}
  const char* name() const override {
    return "EdgeR1ExpertsVjp";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    for (auto& one : out) {
      allocate(one);
    }
    Sizes s{in[0].shape(0), in[1].shape(1), in[3].shape(0), in[0].shape(1), in[3].shape(1)};
    Weights w{in[3].data<float>(), in[4].data<float>(), in[5].data<float>()};
    Gradients to{out[0].data<float>(), out[1].data<float>(), out[2].data<float>(), out[3].data<float>(),
                 out[4].data<float>()};
    launch(stream(), [=, &g = gemm_engine(mixed_), x = in[0].data<float>(), i = in[1].data<uint32_t>(),
                      shares = in[2].data<float>(), d_out = in[6].data<float>()] {
      run_backward(g, s, x, i, shares, w, d_out, to);
    });
  }

 private:
  bool mixed_;
};

std::vector<mx::array> checked(const mx::array& x, const mx::array& indices, const mx::array& shares,
                               const mx::array& gate, const mx::array& up, const mx::array& down) {
  std::vector<mx::array> in{plain_input(x, 2, "experts: x"), plain_input(indices, 2, "experts: indices", mx::uint32),
                            plain_input(shares, 2, "experts: shares"), plain_input(gate, 3, "experts: gate"),
                            plain_input(up, 3, "experts: up"), plain_input(down, 3, "experts: down")};
  mx::Shape flipped{gate.shape(0), gate.shape(2), gate.shape(1)};
  require(x.shape(0) == indices.shape(0) && indices.shape() == shares.shape() && gate.shape(2) == x.shape(1) &&
              gate.shape() == up.shape() && down.shape() == flipped && x.size() > 0 && gate.size() > 0,
          "experts: expected x [T, D], indices and shares [T, k], gate and up [E, M, D], down [E, D, M]");
  return in;
}

} // namespace

mx::array experts(const mx::array& x, const mx::array& indices, const mx::array& shares, const mx::array& gate,
                  const mx::array& up, const mx::array& down, bool mixed) {
  mx::Stream stream = train_stream("experts");
  return mx::array(x.shape(), mx::float32, std::make_shared<Experts>(stream, mixed),
                   checked(x, indices, shares, gate, up, down));
}

std::vector<mx::array> experts_vjp(const mx::array& x, const mx::array& indices, const mx::array& shares,
                                   const mx::array& gate, const mx::array& up, const mx::array& down,
                                   const mx::array& d_out, bool mixed) {
  mx::Stream stream = train_stream("experts_vjp");
  auto in = checked(x, indices, shares, gate, up, down);
  require(d_out.shape() == x.shape(), "experts_vjp: expected a cotangent of the shape of x");
  in.push_back(plain_input(d_out, 2, "experts_vjp: the cotangent"));
  return mx::array::make_arrays({x.shape(), shares.shape(), gate.shape(), up.shape(), down.shape()},
                                std::vector<mx::Dtype>(5, mx::float32), std::make_shared<ExpertsVjp>(stream, mixed), in);
}

} // namespace edger1
