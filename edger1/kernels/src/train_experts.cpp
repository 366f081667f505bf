// The routed experts of a MoE layer, forwards and backwards, without a row being written for each choice.
//
// Tokens go through in chunks of a fixed size: a chunk's choices are ordered by expert, each expert takes its rows, and its
// results are added to the chunk's tokens while those are in the cache. Backwards a second pass, over experts, sums the
// weights' gradients from what the first left behind. The intermediate rows are computed again and not kept.
#include <memory>
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

struct Weights {
  const float *gate, *up, *down;
};
// Of one expert with `inner` rows in gate and up.
struct Expert {
  Matrix gate, up, down;
};

Expert expert_of(const Weights& w, int64_t dim, int64_t inner, int64_t e) {
  int64_t at = e * inner * dim;
  return {rows_of(w.gate + at, dim), rows_of(w.up + at, dim), rows_of(w.down + at, inner)};
}

struct Inputs {
  const float* x;
  const uint32_t* indices;
  const float* shares;
  Weights routed, shared;
  int64_t shared_inner; // 0: there is no shared expert
};

// Rows as they are multiplied, rounded once where the engine rounds.
class Rows {
 public:
  static size_t bytes(const GemmEngine& g, int64_t rows, int64_t dim) {
    return g.stored == Float::f32 ? 0 : static_cast<size_t>(rows * dim * bytes_of(g.stored));
  }
  Rows(const GemmEngine& g, const float* from, int64_t rows, int64_t dim, void* room)
      : type_(g.stored), dim_(dim), data_(g.stored == Float::f32 ? from : room) {
    if (type_ != Float::f32) {
      parallel_ranges(rows, 256, [&](int64_t r, int64_t end) {
        ops().from_f32(offset(room, type_, r * dim), type_, from + r * dim, (end - r) * dim);
      });
    }
  }
  Matrix at(int64_t row) const {
    return {offset(data_, type_, row * dim_), type_, dim_, 1};
  }
  // Those of some choices, copied to `to`.
  Matrix gathered(void* to, const uint32_t* choice, int count, int64_t chosen) const {
    auto size = static_cast<size_t>(dim_ * bytes_of(type_));
    for (int i = 0; i < count; i++) {
      std::memcpy(static_cast<char*>(to) + static_cast<size_t>(i) * size,
                  offset(data_, type_, choice[i] / chosen * dim_), size);
    }
    return {to, type_, dim_, 1};
  }

 private:
  Float type_;
  int64_t dim_;
  const void* data_;
};

// An expert's weights packed for the way forward.
struct Packed {
  size_t gate, up, down, total;

  Packed(const GemmEngine& g, int64_t dim, int64_t inner) {
    Carver carver;
    gate = carver.reserve(g.b_bytes(dim, inner));
    up = carver.reserve(g.b_bytes(dim, inner));
    down = carver.reserve(g.b_bytes(inner, dim));
    total = carver.total();
  }
  void pack(const GemmEngine& g, char* to, const Expert& w, int64_t dim, int64_t inner) const {
    int d = static_cast<int>(dim), m = static_cast<int>(inner);
    g.pack_b(to + gate, transposed(w.gate), d, m);
    g.pack_b(to + up, transposed(w.up), d, m);
    g.pack_b(to + down, transposed(w.down), m, d);
  }
};

// And for the way back, on which gate and up are computed again.
struct PackedBack {
  size_t gate, up, d_inner, d_gate, d_up, total;

  PackedBack(const GemmEngine& g, int64_t dim, int64_t inner) {
    Carver carver;
    for (size_t* at : {&gate, &up, &d_inner}) {
      *at = carver.reserve(g.b_bytes(dim, inner));
    }
    for (size_t* at : {&d_gate, &d_up}) {
      *at = carver.reserve(g.b_bytes(inner, dim));
    }
    total = carver.total();
  }
  void pack(const GemmEngine& g, char* to, const Expert& w, int64_t dim, int64_t inner) const {
    int d = static_cast<int>(dim), m = static_cast<int>(inner);
    g.pack_b(to + gate, transposed(w.gate), d, m);
    g.pack_b(to + up, transposed(w.up), d, m);
    g.pack_b(to + d_inner, w.down, d, m);
    g.pack_b(to + d_gate, w.gate, m, d);
    g.pack_b(to + d_up, w.up, m, d);
  }
};

// Room for a block of rows of an expert on one thread.
struct Room {
  char* rows;
  char* a;
  float *wide, *part[6];

  static size_t lay_out(const GemmEngine& g, int64_t dim, int64_t inner, size_t at[9]) {
    Carver own;
    at[0] = own.reserve(sizeof(float) * static_cast<size_t>(kBlockRows * dim));
    at[1] = own.reserve(g.a_bytes(kBlockRows, std::max(dim, inner)));
    at[2] = own.reserve(sizeof(float) * static_cast<size_t>(kBlockRows * dim));
    for (int i = 0; i < 6; i++) {
      at[3 + i] = own.reserve(sizeof(float) * static_cast<size_t>(kBlockRows * inner));
    }
    return own.total();
  }
  Room(const GemmEngine& g, int64_t dim, int64_t inner) {
    size_t at[9];
    auto* scratch = static_cast<char*>(thread_scratch(0, lay_out(g, dim, inner, at)));
    rows = scratch + at[0];
    a = scratch + at[1];
    wide = reinterpret_cast<float*>(scratch + at[2]);
    for (int i = 0; i < 6; i++) {
      part[i] = reinterpret_cast<float*>(scratch + at[3 + i]);
    }
  }
};

// silu(gate x) * up x of a block of rows becomes room.part[0].
void intermediate(const GemmEngine& g, const Room& room, const Matrix& x, const char* gate, const char* up, int count,
                  int dim, int inner) {
  g.pack_a(room.a, x, count, dim);
  g.gemm(room.part[1], inner, room.a, gate, count, inner, dim, false);
  g.gemm(room.part[2], inner, room.a, up, count, inner, dim, false);
  ops().gate(Gate::swiglu, room.part[0], room.part[1], room.part[2], int64_t{count} * inner, 0, 0);
}

void run_forward(const GemmEngine& g, const Sizes& s, const Inputs& in, float* out) {
  int dim = static_cast<int>(s.dim), inner = static_cast<int>(s.inner), shared = static_cast<int>(in.shared_inner);
  Packed one(g, dim, inner), common(g, dim, shared);
  Carver whole;
  size_t packed_at = whole.reserve(one.total * static_cast<size_t>(s.experts)), common_at = whole.reserve(common.total);
  size_t x_at = whole.reserve(Rows::bytes(g, s.tokens, dim));
  auto* base = static_cast<char*>(thread_scratch(1, whole.total()));
  char *packed = base + packed_at, *common_packed = base + common_at;
  Rows x(g, in.x, s.tokens, dim, base + x_at);
  parallel_for(s.experts + 1, [&](int64_t e) {
    if (e > 0) {
      one.pack(g, packed + one.total * static_cast<size_t>(e - 1), expert_of(in.routed, dim, inner, e - 1), dim, inner);
    } else if (shared) {
      common.pack(g, common_packed, expert_of(in.shared, dim, shared, 0), dim, shared);
    }
  });
  parallel_for(s.chunks(), [&](int64_t chunk) {
    int64_t t0 = chunk * s.chunk(), t1 = std::min(t0 + s.chunk(), s.tokens);
    Order order(s, in.indices, t0, t1);
    Room room(g, dim, std::max(inner, shared));
    for (int64_t t = t0; t < t1; t += kBlockRows) {
      int count = static_cast<int>(std::min<int64_t>(kBlockRows, t1 - t));
      if (shared) {
        intermediate(g, room, x.at(t), common_packed + common.gate, common_packed + common.up, count, dim, shared);
        g.pack_a(room.a, rows_of(room.part[0], shared), count, shared);
        g.gemm(out + t * dim, dim, room.a, common_packed + common.down, count, dim, shared, false);
      } else {
        std::memset(out + t * dim, 0, sizeof(float) * static_cast<size_t>(count) * static_cast<size_t>(dim));
      }
    }
    for (int64_t e = 0; e < s.experts; e++) {
      const char* from = packed + one.total * static_cast<size_t>(e);
      for (int64_t i = order.first[e]; i < order.first[e + 1]; i += kBlockRows) {
        int count = static_cast<int>(std::min<int64_t>(kBlockRows, order.first[e + 1] - i));
        const uint32_t* choice = order.choice.data() + i;
        intermediate(g, room, x.gathered(room.rows, choice, count, s.chosen), from + one.gate, from + one.up, count, dim,
                     inner);
        g.pack_a(room.a, rows_of(room.part[0], inner), count, inner);
        g.gemm(room.wide, dim, room.a, from + one.down, count, dim, inner, false);
        for (int r = 0; r < count; r++) {
          ops().blend_row(out + choice[r] / s.chosen * dim, 1, room.wide + r * s.dim, in.shares[choice[r]], dim);
        }
      }
    }
  });
}

struct Gradients {
  float *x, *shares, *gate, *up, *down, *shared_gate, *shared_up, *shared_down;
};

float dot(const float* x, const float* y, int n) {
  float found;
  ops().dot_rows(&found, 1, x, n, 1, y, Float::f32, n, n, 0, 1);
  return found;
}

// What a row leaves for its expert's gradients: those of gate and up, and the weighted intermediate row.
struct Kept {
  Float type;
  int64_t inner;
  char* data;

  static size_t bytes(const GemmEngine& g, int64_t rows, int64_t inner) {
    return static_cast<size_t>(rows * 3 * inner * bytes_of(g.stored));
  }
  void put(int64_t row, int part, const float* from) const {
    ops().from_f32(offset(data, type, (row * 3 + part) * inner), type, from, inner);
  }
  // Transposed: a row for each inner dimension, along k from row to row.
  Matrix columns(int64_t row, int part) const {
    return {offset(data, type, (row * 3 + part) * inner), type, 1, 3 * inner};
  }
};

// From room's intermediate rows and the gradients of an expert's results to those of its inputs, in room.wide.
void block_back(const GemmEngine& g, const Room& room, const PackedBack& at, const char* packed, const Matrix& d_out,
                int count, int dim, int inner, const float* shares, const uint32_t* choice, float* d_shares,
                const Kept& kept, int64_t kept_row) {
  auto [h, gates, ups, d_h, d_gates, d_ups] = room.part;
  g.pack_a(room.a, d_out, count, dim);
  g.gemm(d_h, inner, room.a, packed + at.d_inner, count, inner, dim, false);
  for (int r = 0; r < count; r++) {
    if (choice) {
      d_shares[choice[r]] = dot(h + r * inner, d_h + r * inner, inner);
      ops().scale_row(h + r * inner, shares[choice[r]], inner);
      ops().scale_row(d_h + r * inner, shares[choice[r]], inner);
    }
    kept.put(kept_row + r, 2, h + r * inner);
  }
  ops().gate_vjp(Gate::swiglu, d_gates, d_ups, gates, ups, d_h, int64_t{count} * inner, 0, 0);
  for (int r = 0; r < count; r++) {
    kept.put(kept_row + r, 0, d_gates + r * inner);
    kept.put(kept_row + r, 1, d_ups + r * inner);
  }
  g.pack_a(room.a, rows_of(d_gates, inner), count, inner);
  g.gemm(room.wide, dim, room.a, packed + at.d_gate, count, dim, inner, false);
  g.pack_a(room.a, rows_of(d_ups, inner), count, inner);
  g.gemm(room.wide, dim, room.a, packed + at.d_up, count, dim, inner, true);
}

void transpose_into(float* to, const float* from, int64_t rows, int64_t columns) {
  constexpr int64_t kSquare = 16;
  for (int64_t i = 0; i < rows; i += kSquare) {
    for (int64_t j = 0; j < columns; j++) {
      for (int64_t ii = i; ii < std::min(i + kSquare, rows); ii++) {
        to[j * rows + ii] = from[ii * columns + j];
      }
    }
  }
}

// Memory that the products at the end, which use both scratch slots, leave alone; kept, for the pages of so much would
// have to be found anew each time.
char* lasting(size_t bytes) {
  static thread_local std::unique_ptr<char[]> memory;
  static thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset();
    memory.reset(new char[bytes + 64]);
    size = bytes;
  }
  return memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64;
}

void run_backward(const GemmEngine& g, const Sizes& s, const Inputs& in, const float* d_out_in, const Gradients& to) {
  int dim = static_cast<int>(s.dim), inner = static_cast<int>(s.inner), shared = static_cast<int>(in.shared_inner);
  PackedBack one(g, dim, inner), common(g, dim, shared);
  Carver whole;
  size_t packed_at = whole.reserve(one.total * static_cast<size_t>(s.experts)), common_at = whole.reserve(common.total);
  size_t x_at = whole.reserve(Rows::bytes(g, s.tokens, dim)), d_at = whole.reserve(Rows::bytes(g, s.tokens, dim));
  size_t kept_at = whole.reserve(Kept::bytes(g, s.tokens * s.chosen, inner));
  size_t common_kept_at = whole.reserve(Kept::bytes(g, s.tokens, shared));
  char* base = lasting(whole.total());
  char *packed = base + packed_at, *common_packed = base + common_at;
  Kept kept{g.stored, inner, base + kept_at}, common_kept{g.stored, shared, base + common_kept_at};
  Rows x(g, in.x, s.tokens, dim, base + x_at), d_out(g, d_out_in, s.tokens, dim, base + d_at);
  std::vector<Order> orders;
  orders.reserve(static_cast<size_t>(s.chunks()));
  for (int64_t chunk = 0; chunk < s.chunks(); chunk++) {
    orders.emplace_back(s, in.indices, chunk * s.chunk(), std::min((chunk + 1) * s.chunk(), s.tokens));
  }
  parallel_for(s.experts + 1, [&](int64_t e) {
    if (e > 0) {
      one.pack(g, packed + one.total * static_cast<size_t>(e - 1), expert_of(in.routed, dim, inner, e - 1), dim, inner);
    } else if (shared) {
      common.pack(g, common_packed, expert_of(in.shared, dim, shared, 0), dim, shared);
    }
  });
  parallel_for(s.chunks(), [&](int64_t chunk) {
    int64_t t0 = chunk * s.chunk(), t1 = std::min(t0 + s.chunk(), s.tokens);
    const Order& order = orders[static_cast<size_t>(chunk)];
    Room room(g, dim, std::max(inner, shared));
    for (int64_t t = t0; t < t1; t += kBlockRows) {
      int count = static_cast<int>(std::min<int64_t>(kBlockRows, t1 - t));
      auto size = sizeof(float) * static_cast<size_t>(count) * static_cast<size_t>(dim);
      if (shared) {
        intermediate(g, room, x.at(t), common_packed + common.gate, common_packed + common.up, count, dim, shared);
        block_back(g, room, common, common_packed, d_out.at(t), count, dim, shared, nullptr, nullptr, nullptr, common_kept, t);
        std::memcpy(to.x + t * dim, room.wide, size);
      } else {
        std::memset(to.x + t * dim, 0, size);
      }
    }
    for (int64_t e = 0; e < s.experts; e++) {
      const char* p = packed + one.total * static_cast<size_t>(e);
      for (int64_t i = order.first[e]; i < order.first[e + 1]; i += kBlockRows) {
        int count = static_cast<int>(std::min<int64_t>(kBlockRows, order.first[e + 1] - i));
        const uint32_t* choice = order.choice.data() + i;
        intermediate(g, room, x.gathered(room.rows, choice, count, s.chosen), p + one.gate, p + one.up, count, dim, inner);
        block_back(g, room, one, p, d_out.gathered(room.rows, choice, count, s.chosen), count, dim, inner, in.shares,
                   choice, to.shares, kept, t0 * s.chosen + i);
        for (int r = 0; r < count; r++) {
          ops().blend_row(to.x + choice[r] / s.chosen * dim, 1, room.wide + r * s.dim, 1, dim);
        }
      }
    }
  });
  parallel_for(s.experts, [&](int64_t e) {
    Carver own;
    size_t rows_at = own.reserve(sizeof(float) * static_cast<size_t>(kPackedDepth * dim));
    size_t a_at = own.reserve(g.a_bytes(inner, kPackedDepth)), b_at = own.reserve(g.b_bytes(kPackedDepth, dim));
    size_t sum_at = own.reserve(sizeof(float) * static_cast<size_t>(s.inner * dim));
    auto* scratch = static_cast<char*>(thread_scratch(0, own.total()));
    char *rows = scratch + rows_at, *a = scratch + a_at, *b = scratch + b_at;
    auto* down = reinterpret_cast<float*>(scratch + sum_at);
    float *gate = to.gate + e * s.inner * dim, *up = to.up + e * s.inner * dim, *d_down = to.down + e * dim * s.inner;
    bool any = false;
    for (int64_t chunk = 0; chunk < s.chunks(); chunk++) {
      const Order& order = orders[static_cast<size_t>(chunk)];
      for (int64_t i = order.first[e]; i < order.first[e + 1]; i += kPackedDepth) {
        int count = static_cast<int>(std::min<int64_t>(kPackedDepth, order.first[e + 1] - i));
        const uint32_t* choice = order.choice.data() + i;
        int64_t row = chunk * s.chunk() * s.chosen + i;
        auto product = [&](float* c, int part) {
          g.pack_a(a, kept.columns(row, part), inner, count);
          g.gemm(c, dim, a, b, inner, dim, count, any);
        };
        g.pack_b(b, x.gathered(rows, choice, count, s.chosen), count, dim);
        product(gate, 0);
        product(up, 1);
        g.pack_b(b, d_out.gathered(rows, choice, count, s.chosen), count, dim);
        product(down, 2);
        any = true;
      }
    }
    if (any) {
      transpose_into(d_down, down, inner, dim);
    } else {
      for (float* one_of : {gate, up, d_down}) {
        std::memset(one_of, 0, sizeof(float) * static_cast<size_t>(s.inner * dim));
      }
    }
  });
  if (shared) {
    engine_matmul(g, to.shared_gate, dim, common_kept.columns(0, 0), x.at(0), shared, dim, s.tokens);
    engine_matmul(g, to.shared_up, dim, common_kept.columns(0, 1), x.at(0), shared, dim, s.tokens);
    engine_matmul(g, to.shared_down, shared, transposed(d_out.at(0)), transposed(common_kept.columns(0, 2)), dim, shared,
                  s.tokens);
  }
}

Sizes sizes_of(const std::vector<mx::array>& in) {
  return {in[0].shape(0), in[1].shape(1), in[3].shape(0), in[0].shape(1), in[3].shape(1)};
}

Inputs inputs_of(const std::vector<mx::array>& in) {
  auto at = [&](size_t i) { return in[i].data<float>(); };
  bool shared = in.size() > 8;
  return {at(0), in[1].data<uint32_t>(), at(2), {at(3), at(4), at(5)},
          shared ? Weights{at(6), at(7), at(8)} : Weights{}, shared ? in[6].shape(0) : 0};
}

class Experts : public TrainPrimitive {
 public:
  Experts(mx::Stream s, bool mixed) : TrainPrimitive(s), mixed_(mixed) {}
  const char* name() const override {
    return "EdgeR1Experts";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    launch(stream(), [s = sizes_of(in), from = inputs_of(in), &g = gemm_engine(mixed_), to = out[0].data<float>()] {
      run_forward(g, s, from, to);
    });
  }

 private:
  bool mixed_;
};

// The cotangent comes last.
class ExpertsVjp : public TrainPrimitive {
 public:
  ExpertsVjp(mx::Stream s, bool mixed) : TrainPrimitive(s), mixed_(mixed) {}
  const char* name() const override {
    return "EdgeR1ExpertsVjp";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    float* to[8] = {};
    for (size_t i = 0; i < out.size(); i++) {
      allocate(out[i]);
      to[i] = out[i].data<float>();
    }
    Gradients gradients{to[0], to[1], to[2], to[3], to[4], to[5], to[6], to[7]};
    launch(stream(), [s = sizes_of(in), from = inputs_of(in), &g = gemm_engine(mixed_), d_out = in.back().data<float>(),
                      gradients] { run_backward(g, s, from, d_out, gradients); });
  }

 private:
  bool mixed_;
};

std::vector<mx::array> checked(const mx::array& x, const mx::array& indices, const mx::array& shares,
                               const std::vector<mx::array>& weights) {
  require(weights.size() == 3 || weights.size() == 6, "experts: expected gate, up and down, of a shared expert too or not");
  const auto &gate = weights[0], &up = weights[1], &down = weights[2];
  std::vector<mx::array> in{plain_input(x, 2, "experts: x"), plain_input(indices, 2, "experts: indices", mx::uint32),
                            plain_input(shares, 2, "experts: shares")};
  for (size_t i = 0; i < weights.size(); i++) {
    in.push_back(plain_input(weights[i], i < 3 ? 3 : 2, "experts: a weight"));
  }
  mx::Shape flipped{gate.shape(0), gate.shape(2), gate.shape(1)};
  bool fits = x.shape(0) == indices.shape(0) && indices.shape() == shares.shape() && gate.shape(2) == x.shape(1) &&
      gate.shape() == up.shape() && down.shape() == flipped && x.size() > 0 && gate.size() > 0 && indices.size() > 0;
  if (weights.size() == 6) {
    mx::Shape back{weights[3].shape(1), weights[3].shape(0)};
    fits = fits && weights[3].shape(1) == x.shape(1) && weights[3].shape() == weights[4].shape() &&
        weights[5].shape() == back && weights[3].size() > 0;
  }
  require(fits, "experts: expected x [T, D], indices and shares [T, k], gate and up [E, M, D], down [E, D, M], and of the "
                "shared expert [S, D], [S, D] and [D, S]");
  return in;
}

} // namespace

mx::array experts(const mx::array& x, const mx::array& indices, const mx::array& shares,
                  const std::vector<mx::array>& weights, bool mixed) {
  mx::Stream stream = train_stream("experts");
  return mx::array(x.shape(), mx::float32, std::make_shared<Experts>(stream, mixed), checked(x, indices, shares, weights));
}

std::vector<mx::array> experts_vjp(const mx::array& x, const mx::array& indices, const mx::array& shares,
                                   const std::vector<mx::array>& weights, const mx::array& d_out, bool mixed) {
  mx::Stream stream = train_stream("experts_vjp");
  auto in = checked(x, indices, shares, weights);
  require(d_out.shape() == x.shape(), "experts_vjp: expected a cotangent of the shape of x");
  in.push_back(plain_input(d_out, 2, "experts_vjp: the cotangent"));
  std::vector<mx::Shape> shapes{x.shape(), shares.shape()};
  for (const auto& one : weights) {
    shapes.push_back(one.shape());
  }
  std::vector<mx::Dtype> dtypes(shapes.size(), mx::float32);
  return mx::array::make_arrays(shapes, dtypes, std::make_shared<ExpertsVjp>(stream, mixed), in);
}

} // namespace edger1
