// Causal attention within the documents of packed rows, forwards and backwards, rotary positions included.
//
// A document is a problem of its own, so documents cost the squares of their own lengths and not the row's. Queries and keys
// are put together (a part as it is, a part rotated) in the cache, on their way to the product. Each document goes
// through in blocks of rows against the keys up to the block's end; weights are computed again backwards and not kept.
#include "rope.h"
#include "train_common.h"
#include "train_ops.h"

namespace edger1 {
namespace {

constexpr int64_t kBlockRows = 64;

struct Sizes {
  int64_t batch, length, heads, kv_heads, rope_heads;
  int64_t plain, rotated, value_dim;
  float scale, base;
  bool interleaved;

  int64_t group() const {
    return heads / kv_heads;
  }
  int64_t dim() const {
    return plain + rotated;
  }
  int64_t kv_row() const {
    return kv_heads * (plain + value_dim);
  }
  std::shared_ptr<const Angles> angles() const {
    int half = static_cast<int>(rotated / 2);
    std::vector<float> inverse(static_cast<size_t>(half));
    for (int i = 0; i < half; i++) {
      inverse[static_cast<size_t>(i)] = inverse_frequency(base, i, half);
    }
    return angles_for(0, static_cast<int>(length), 1.0f, inverse);
  }
};

// Calls body(first, count) for each document of a row.
template <class Body>
void each_document(const int32_t* starts, int64_t length, Body body) {
  for (int64_t first = 0; first < length;) {
    int64_t last = first + 1;
    while (last < length && starts[last] == starts[first]) {
      last++;
    }
    body(first, last - first);
    first = last;
  }
}

int64_t longest_document(const Sizes& s, const int32_t* starts) {
  int64_t longest = 1;
  for (int64_t b = 0; b < s.batch; b++) {
    each_document(starts + b * s.length, s.length, [&](int64_t, int64_t count) { longest = std::max(longest, count); });
  }
  return longest;
}

struct Inputs {
  const float *q, *kv, *rope;
  const int32_t* starts;
};

// What a document of a row reads: b * length + first is where it begins among all positions.
struct Document {
  const Sizes& s;
  const Inputs& in;
  const Angles* angles;
  int64_t begin, count;

  void turn(float* out, const float* from, int64_t position, bool back) const {
    int t = static_cast<int>(position);
    ops().rope(out, from, angles->cosines(t), angles->sines(t), static_cast<int>(s.rotated / 2), s.interleaved, back);
  }
  // Queries i .. i + rows of a head, ready to be multiplied, [rows][dim].
  void queries(float* to, int64_t i, int rows, int64_t head) const {
    for (int r = 0; r < rows; r++) {
      const float* from = in.q + ((begin + i + r) * s.heads + head) * s.dim();
      std::memcpy(to, from, sizeof(float) * static_cast<size_t>(s.plain));
      if (s.rotated) {
        turn(to + s.plain, from + s.plain, i + r, false);
      }
      to += s.dim();
    }
  }
  void keys(float* to, int64_t kv) const {
    for (int64_t i = 0; i < count; i++) {
      std::memcpy(to, in.kv + (begin + i) * s.kv_row() + kv * (s.plain + s.value_dim),
                  sizeof(float) * static_cast<size_t>(s.plain));
      if (s.rotated) {
        turn(to + s.plain, in.rope + ((begin + i) * s.rope_heads + (s.rope_heads == 1 ? 0 : kv)) * s.rotated, i, false);
      }
      to += s.dim();
    }
  }
  Matrix values(int64_t kv) const {
    return {in.kv + begin * s.kv_row() + kv * (s.plain + s.value_dim) + s.plain, Float::f32, s.kv_row(), 1};
  }
  int64_t out_at(int64_t i, int64_t head) const {
    return ((begin + i) * s.heads + head) * s.value_dim;
  }
};

// Scores of a block of rows become weights: row r sees its document's first `before` + r + 1 keys.
void weigh(float* scores, int64_t stride, int rows, int64_t before, int keys, float scale) {
  for (int r = 0; r < rows; r++) {
    float* row = scores + r * stride;
    int seen = static_cast<int>(before) + r + 1;
    ops().scale_row(row, scale, seen);
    ops().softmax(row, row, seen);
    std::fill(row + seen, row + keys, 0.0f);
  }
}

void run_forward(const GemmEngine& g, const Sizes& s, const Inputs& in, float* out) {
  int64_t longest = longest_document(s, in.starts);
  int dim = static_cast<int>(s.dim()), value_dim = static_cast<int>(s.value_dim);
  auto angles = s.angles();
  parallel_for(s.batch * s.kv_heads, [&](int64_t task) {
    int64_t b = task / s.kv_heads, kv = task % s.kv_heads;
    Carver own;
    size_t k_at = own.reserve(g.b_bytes(dim, longest)), v_at = own.reserve(g.b_bytes(longest, s.value_dim));
    size_t a_at = own.reserve(g.a_bytes(kBlockRows, std::max<int64_t>(longest, dim)));
    size_t rows_at = own.reserve(sizeof(float) * static_cast<size_t>(std::max(longest, kBlockRows) * dim));
    size_t scores_at = own.reserve(sizeof(float) * static_cast<size_t>(kBlockRows * longest));
    auto* scratch = static_cast<char*>(thread_scratch(0, own.total()));
    char *packed_k = scratch + k_at, *packed_v = scratch + v_at, *a = scratch + a_at;
    auto *scores = reinterpret_cast<float*>(scratch + scores_at), *rows_of_keys = reinterpret_cast<float*>(scratch + rows_at);
    each_document(in.starts + b * s.length, s.length, [&](int64_t first, int64_t count) {
      Document document{s, in, angles.get(), b * s.length + first, count};
      document.keys(rows_of_keys, kv);
      g.pack_b(packed_k, transposed(rows_of(rows_of_keys, dim)), dim, static_cast<int>(count));
      for (int64_t i = 0; i < count; i += kBlockRows) {
        int rows = static_cast<int>(std::min(kBlockRows, count - i)), seen = static_cast<int>(i) + rows;
        g.pack_b(packed_v, document.values(kv), seen, value_dim);
        for (int64_t h = kv * s.group(); h < (kv + 1) * s.group(); h++) {
          document.queries(rows_of_keys, i, rows, h);
          g.pack_a(a, rows_of(rows_of_keys, dim), rows, dim);
          g.gemm(scores, longest, a, packed_k, rows, seen, dim, false);
          weigh(scores, longest, rows, i, seen, s.scale);
          g.pack_a(a, rows_of(scores, longest), rows, seen);
          g.gemm(out + document.out_at(i, h), s.heads * s.value_dim, a, packed_v, rows, value_dim, seen, false);
        }
      }
    });
  });
}

struct Gradients {
  float *q, *kv, *rope;
};

void run_backward(const GemmEngine& g, const Sizes& s, const Inputs& in, const float* d_out, const Gradients& to) {
  int64_t longest = longest_document(s, in.starts);
  int dim = static_cast<int>(s.dim()), value_dim = static_cast<int>(s.value_dim);
  auto angles = s.angles();
  // Heads that share rotated keys add to one gradient: a task has all heads of its row, in order.
  parallel_for(s.batch, [&](int64_t b) {
    int64_t wide = std::max<int64_t>({longest, dim, s.value_dim});
    Carver own;
    // Keys and values as columns, keys as rows of k, and a block's queries or output gradients.
    size_t k_at = own.reserve(g.b_bytes(dim, longest)), v_at = own.reserve(g.b_bytes(s.value_dim, longest));
    size_t rows_at = own.reserve(g.b_bytes(longest, dim)), block_at = own.reserve(g.b_bytes(kBlockRows, std::max<int64_t>(dim, s.value_dim)));
    size_t a_at = own.reserve(std::max(g.a_bytes(kBlockRows, wide), g.a_bytes(longest, kBlockRows)));
    size_t sizes[] = {sizeof(float) * static_cast<size_t>(kBlockRows * longest), sizeof(float) * static_cast<size_t>(kBlockRows * longest),
                      sizeof(float) * static_cast<size_t>(longest * dim), sizeof(float) * static_cast<size_t>(longest * dim),
                      sizeof(float) * static_cast<size_t>(kBlockRows * dim), sizeof(float) * static_cast<size_t>(s.rotated)};
    for (size_t& one : sizes) {
      one = own.reserve(one);
    }
    auto* scratch = static_cast<char*>(thread_scratch(0, own.total()));
    char *packed_k = scratch + k_at, *packed_v = scratch + v_at, *key_rows = scratch + rows_at;
    char *block = scratch + block_at, *a = scratch + a_at;
    float* floats[6];
    for (int i = 0; i < 6; i++) {
      floats[i] = reinterpret_cast<float*>(scratch + sizes[i]);
    }
    auto [p, d, keys, d_keys, queries, turned] = floats;
    if (s.rotated) {
      std::memset(to.rope + b * s.length * s.rope_heads * s.rotated, 0,
                  sizeof(float) * static_cast<size_t>(s.length * s.rope_heads * s.rotated));
    }
    std::memset(to.kv + b * s.length * s.kv_row(), 0, sizeof(float) * static_cast<size_t>(s.length * s.kv_row()));
    each_document(in.starts + b * s.length, s.length, [&](int64_t first, int64_t count) {
      Document document{s, in, angles.get(), b * s.length + first, count};
      for (int64_t kv = 0; kv < s.kv_heads; kv++) {
        float* d_kv = to.kv + document.begin * s.kv_row() + kv * (s.plain + s.value_dim);
        document.keys(keys, kv);
        std::memset(d_keys, 0, sizeof(float) * static_cast<size_t>(count * dim));
        g.pack_b(packed_k, transposed(rows_of(keys, dim)), dim, static_cast<int>(count));
        g.pack_b(packed_v, transposed(document.values(kv)), value_dim, static_cast<int>(count));
        for (int64_t i = 0; i < count; i += kBlockRows) {
          int rows = static_cast<int>(std::min(kBlockRows, count - i)), seen = static_cast<int>(i) + rows;
          g.pack_b(key_rows, rows_of(keys, dim), seen, dim);
          for (int64_t h = kv * s.group(); h < (kv + 1) * s.group(); h++) {
            Matrix d_outs{d_out + document.out_at(i, h), Float::f32, s.heads * s.value_dim, 1};
            document.queries(queries, i, rows, h);
            g.pack_a(a, rows_of(queries, dim), rows, dim);
            g.gemm(p, longest, a, packed_k, rows, seen, dim, false);
            weigh(p, longest, rows, i, seen, s.scale);
            g.pack_a(a, d_outs, rows, value_dim);
            g.gemm(d, longest, a, packed_v, rows, seen, value_dim, false);
            g.pack_a(a, transposed(rows_of(p, longest)), seen, rows);
            g.pack_b(block, d_outs, rows, value_dim);
            g.gemm(d_kv + s.plain, s.kv_row(), a, block, seen, value_dim, rows, true);
            for (int r = 0; r < rows; r++) {
              ops().softmax_vjp(d + r * longest, p + r * longest, d + r * longest, seen);
              ops().scale_row(d + r * longest, s.scale, seen);
            }
            g.pack_b(block, rows_of(queries, dim), rows, dim);
            g.pack_a(a, rows_of(d, longest), rows, seen);
            float* d_q = to.q + ((document.begin + i) * s.heads + h) * dim;
            g.gemm(d_q, s.heads * dim, a, key_rows, rows, dim, seen, false);
            for (int r = 0; s.rotated && r < rows; r++) {
              float* one = d_q + r * s.heads * dim + s.plain;
              document.turn(one, one, i + r, true);
            }
            g.pack_a(a, transposed(rows_of(d, longest)), seen, rows);
            g.gemm(d_keys, dim, a, block, seen, dim, rows, true);
          }
        }
        for (int64_t i = 0; i < count; i++) {
          std::memcpy(d_kv + i * s.kv_row(), d_keys + i * dim, sizeof(float) * static_cast<size_t>(s.plain));
          if (s.rotated) {
            document.turn(turned, d_keys + i * dim + s.plain, i, true);
            float* sum = to.rope + ((document.begin + i) * s.rope_heads + (s.rope_heads == 1 ? 0 : kv)) * s.rotated;
            ops().blend_row(sum, 1, turned, 1, static_cast<int>(s.rotated));
          }
        }
      }
    });
  });
}

Inputs inputs_of(const std::vector<mx::array>& in) {
  return {in[0].data<float>(), in[1].data<float>(), in[2].data<float>(), in[3].data<int32_t>()};
}

class Attention : public TrainPrimitive {
 public:
  Attention(mx::Stream stream, Sizes s, bool mixed) : TrainPrimitive(stream), s_(s), mixed_(mixed) {}
  const char* name() const override {
    return "EdgeR1DocumentAttention";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    launch(stream(), [s = s_, &g = gemm_engine(mixed_), from = inputs_of(in), to = out[0].data<float>()] {
      run_forward(g, s, from, to);
    });
  }

 private:
  Sizes s_;
  bool mixed_;
};

class AttentionVjp : public TrainPrimitive {
 public:
  AttentionVjp(mx::Stream stream, Sizes s, bool mixed) : TrainPrimitive(stream), s_(s), mixed_(mixed) {}
  const char* name() const override {
    return "EdgeR1DocumentAttentionVjp";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    for (auto& one : out) {
      allocate(one);
    }
    Gradients to{out[0].data<float>(), out[1].data<float>(), out[2].data<float>()};
    launch(stream(), [s = s_, &g = gemm_engine(mixed_), from = inputs_of(in), d_out = in[4].data<float>(), to] {
      run_backward(g, s, from, d_out, to);
    });
  }

 private:
  Sizes s_;
  bool mixed_;
};

Sizes sizes_of(const mx::array& q, const mx::array& kv, const mx::array& rope, const mx::array& starts,
               const AttentionShape& shape) {
  require(q.ndim() == 4 && kv.ndim() == 4 && rope.ndim() == 4 && starts.ndim() == 2,
          "document_attention: expected q, kv and rope of 4 axes and starts of 2");
  Sizes s{q.shape(0), q.shape(1), q.shape(2), kv.shape(2), rope.shape(2), q.shape(3) - rope.shape(3), rope.shape(3), 0,
          shape.scale, shape.base, shape.interleaved};
  s.value_dim = kv.shape(3) - s.plain;
  bool aligned = true;
  for (const auto* a : {&kv, &rope}) {
    aligned &= a->shape(0) == q.shape(0) && a->shape(1) == q.shape(1);
  }
  require(aligned && starts.shape(0) == q.shape(0) && starts.shape(1) == q.shape(1) && s.plain >= 0 &&
              s.value_dim > 0 && s.rotated % 2 == 0 && s.kv_heads > 0 && s.heads % s.kv_heads == 0 && q.size() > 0 &&
              (s.rope_heads == 1 || s.rope_heads == s.kv_heads),
          "document_attention: expected q [B, L, H, N + R], kv [B, L, H / G, N + V], rope [B, L, 1 or H / G, R], R even, "
          "starts [B, L]");
  return s;
}

std::vector<mx::array> plain_inputs(const mx::array& q, const mx::array& kv, const mx::array& rope, const mx::array& starts) {
  return {plain_input(q, 4, "document_attention: q"), plain_input(kv, 4, "document_attention: kv"),
          plain_input(rope, 4, "document_attention: rope"),
          plain_input(starts, 2, "document_attention: starts", mx::int32)};
}

} // namespace

mx::array document_attention(const mx::array& q, const mx::array& kv, const mx::array& rope, const mx::array& starts,
                             const AttentionShape& shape, bool mixed) {
  mx::Stream stream = train_stream("document_attention");
  Sizes s = sizes_of(q, kv, rope, starts, shape);
  mx::Shape out{q.shape(0), q.shape(1), q.shape(2), static_cast<int>(s.value_dim)};
  return mx::array(out, mx::float32, std::make_shared<Attention>(stream, s, mixed), plain_inputs(q, kv, rope, starts));
}

std::vector<mx::array> document_attention_vjp(const mx::array& q, const mx::array& kv, const mx::array& rope,
                                              const mx::array& starts, const mx::array& d_out,
                                              const AttentionShape& shape, bool mixed) {
  mx::Stream stream = train_stream("document_attention_vjp");
  Sizes s = sizes_of(q, kv, rope, starts, shape);
  mx::Shape out{q.shape(0), q.shape(1), q.shape(2), static_cast<int>(s.value_dim)};
  require(d_out.shape() == out, "document_attention_vjp: expected a cotangent of the shape of the result");
  auto in = plain_inputs(q, kv, rope, starts);
  in.push_back(plain_input(d_out, 4, "document_attention_vjp: the cotangent"));
  return mx::array::make_arrays({q.shape(), kv.shape(), rope.shape()}, std::vector<mx::Dtype>(3, mx::float32),
                                std::make_shared<AttentionVjp>(stream, s, mixed), in);
}

} // namespace edger1
