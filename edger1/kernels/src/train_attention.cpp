// Causal attention within the documents of packed rows, forwards and backwards.
//
// A document is a problem of its own, so documents cost the squares of their own lengths and not the row's. Each goes
// through in blocks of rows against the keys up to the block's end; weights are computed again backwards and not kept.
#include "train_common.h"
#include "train_ops.h"

namespace edger1 {
namespace {

constexpr int64_t kBlockRows = 64;

struct Sizes {
  int64_t batch, length, heads, kv_heads, dim, value_dim;
  float scale;

  int64_t group() const {
    return heads / kv_heads;
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

// Rows of one head of one document, as a matrix in place.
Matrix head_rows(const float* data, int64_t b, int64_t position, int64_t head, int64_t length, int64_t heads, int64_t dim) {
  return {data + ((b * length + position) * heads + head) * dim, Float::f32, heads * dim, 1};
}

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

void run_forward(const GemmEngine& g, const Sizes& s, const float* q, const float* k, const float* v,
                 const int32_t* starts, float* out) {
  int64_t longest = longest_document(s, starts);
  int dim = static_cast<int>(s.dim), value_dim = static_cast<int>(s.value_dim);
  parallel_for(s.batch * s.kv_heads, [&](int64_t task) {
    int64_t b = task / s.kv_heads, kv = task % s.kv_heads;
    Carver own;
    size_t k_at = own.reserve(g.b_bytes(s.dim, longest)), v_at = own.reserve(g.b_bytes(longest, s.value_dim));
    size_t a_at = own.reserve(g.a_bytes(kBlockRows, std::max(longest, s.dim)));
    size_t scores_at = own.reserve(sizeof(float) * static_cast<size_t>(kBlockRows * longest));
    auto* scratch = static_cast<char*>(thread_scratch(0, own.total()));
    char *packed_k = scratch + k_at, *packed_v = scratch + v_at, *a = scratch + a_at;
    auto* scores = reinterpret_cast<float*>(scratch + scores_at);
    each_document(starts + b * s.length, s.length, [&](int64_t first, int64_t count) {
      Matrix keys = head_rows(k, b, first, kv, s.length, s.kv_heads, s.dim);
      Matrix values = head_rows(v, b, first, kv, s.length, s.kv_heads, s.value_dim);
      g.pack_b(packed_k, transposed(keys), dim, static_cast<int>(count));
      for (int64_t i = 0; i < count; i += kBlockRows) {
        int rows = static_cast<int>(std::min(kBlockRows, count - i)), seen = static_cast<int>(i) + rows;
        g.pack_b(packed_v, values, seen, value_dim);
        for (int64_t h = kv * s.group(); h < (kv + 1) * s.group(); h++) {
          g.pack_a(a, head_rows(q, b, first + i, h, s.length, s.heads, s.dim), rows, dim);
          g.gemm(scores, longest, a, packed_k, rows, seen, dim, false);
          weigh(scores, longest, rows, i, seen, s.scale);
          g.pack_a(a, rows_of(scores, longest), rows, seen);
          g.gemm(out + ((b * s.length + first + i) * s.heads + h) * s.value_dim, s.heads * s.value_dim, a, packed_v, rows,
                 value_dim, seen, false);
        }
      }
    });
  });
}

void run_backward(const GemmEngine& g, const Sizes& s, const float* q, const float* k, const float* v,
                  const int32_t* starts, const float* d_out, float* d_q, float* d_k, float* d_v) {
  int64_t longest = longest_document(s, starts);
  int dim = static_cast<int>(s.dim), value_dim = static_cast<int>(s.value_dim);
  parallel_for(s.batch * s.kv_heads, [&](int64_t task) {
    int64_t b = task / s.kv_heads, kv = task % s.kv_heads;
    int64_t wide = std::max({longest, s.dim, s.value_dim});
    Carver own;
    // Keys and values as columns, keys as rows of k, and a block's queries or output gradients.
    size_t k_at = own.reserve(g.b_bytes(s.dim, longest)), v_at = own.reserve(g.b_bytes(s.value_dim, longest));
    size_t rows_at = own.reserve(g.b_bytes(longest, s.dim)), block_at = own.reserve(g.b_bytes(kBlockRows, std::max(s.dim, s.value_dim)));
    size_t a_at = own.reserve(std::max(g.a_bytes(kBlockRows, wide), g.a_bytes(longest, kBlockRows)));
    size_t p_at = own.reserve(sizeof(float) * static_cast<size_t>(kBlockRows * longest));
    size_t d_at = own.reserve(sizeof(float) * static_cast<size_t>(kBlockRows * longest));
    auto* scratch = static_cast<char*>(thread_scratch(0, own.total()));
    char *packed_k = scratch + k_at, *packed_v = scratch + v_at, *key_rows = scratch + rows_at;
    char *block = scratch + block_at, *a = scratch + a_at;
    auto *p = reinterpret_cast<float*>(scratch + p_at), *d = reinterpret_cast<float*>(scratch + d_at);
    each_document(starts + b * s.length, s.length, [&](int64_t first, int64_t count) {
      Matrix keys = head_rows(k, b, first, kv, s.length, s.kv_heads, s.dim);
      Matrix values = head_rows(v, b, first, kv, s.length, s.kv_heads, s.value_dim);
      float* to_k = d_k + ((b * s.length + first) * s.kv_heads + kv) * s.dim;
      float* to_v = d_v + ((b * s.length + first) * s.kv_heads + kv) * s.value_dim;
      int64_t k_stride = s.kv_heads * s.dim, v_stride = s.kv_heads * s.value_dim;
      for (int64_t i = 0; i < count; i++) {
        std::memset(to_k + i * k_stride, 0, sizeof(float) * static_cast<size_t>(s.dim));
        std::memset(to_v + i * v_stride, 0, sizeof(float) * static_cast<size_t>(s.value_dim));
      }
      g.pack_b(packed_k, transposed(keys), dim, static_cast<int>(count));
      g.pack_b(packed_v, transposed(values), value_dim, static_cast<int>(count));
      for (int64_t i = 0; i < count; i += kBlockRows) {
        int rows = static_cast<int>(std::min(kBlockRows, count - i)), seen = static_cast<int>(i) + rows;
        g.pack_b(key_rows, keys, seen, dim);
        for (int64_t h = kv * s.group(); h < (kv + 1) * s.group(); h++) {
          Matrix queries = head_rows(q, b, first + i, h, s.length, s.heads, s.dim);
          Matrix d_outs = head_rows(d_out, b, first + i, h, s.length, s.heads, s.value_dim);
          g.pack_a(a, queries, rows, dim);
          g.gemm(p, longest, a, packed_k, rows, seen, dim, false);
          weigh(p, longest, rows, i, seen, s.scale);
          g.pack_a(a, d_outs, rows, value_dim);
          g.gemm(d, longest, a, packed_v, rows, seen, value_dim, false);
          g.pack_a(a, transposed(rows_of(p, longest)), seen, rows);
          g.pack_b(block, d_outs, rows, value_dim);
          g.gemm(to_v, v_stride, a, block, seen, value_dim, rows, true);
          for (int r = 0; r < rows; r++) {
            ops().softmax_vjp(d + r * longest, p + r * longest, d + r * longest, seen);
            ops().scale_row(d + r * longest, s.scale, seen);
          }
          g.pack_a(a, rows_of(d, longest), rows, seen);
          g.gemm(d_q + ((b * s.length + first + i) * s.heads + h) * s.dim, s.heads * s.dim, a, key_rows, rows, dim, seen,
                 false);
          g.pack_a(a, transposed(rows_of(d, longest)), seen, rows);
          g.pack_b(block, queries, rows, dim);
          g.gemm(to_k, k_stride, a, block, seen, dim, rows, true);
        }
      }
    });
  });
}

Sizes sizes_of(const mx::array& q, const mx::array& k, const mx::array& v, float scale) {
  return {q.shape(0), q.shape(1), q.shape(2), k.shape(2), q.shape(3), v.shape(3), scale};
}

class Attention : public TrainPrimitive {
 public:
  Attention(mx::Stream s, float scale, bool mixed) : TrainPrimitive(s), scale_(scale), mixed_(mixed) {}
  const char* name() const override {
    return "EdgeR1DocumentAttention";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    launch(stream(), [s = sizes_of(in[0], in[1], in[2], scale_), &g = gemm_engine(mixed_), q = in[0].data<float>(),
                      k = in[1].data<float>(), v = in[2].data<float>(), starts = in[3].data<int32_t>(),
                      to = out[0].data<float>()] { run_forward(g, s, q, k, v, starts, to); });
  }

 private:
  float scale_;
  bool mixed_;
};

class AttentionVjp : public TrainPrimitive {
 public:
  AttentionVjp(mx::Stream s, float scale, bool mixed) : TrainPrimitive(s), scale_(scale), mixed_(mixed) {}
  const char* name() const override {
    return "EdgeR1DocumentAttentionVjp";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    for (auto& one : out) {
      allocate(one);
    }
    launch(stream(), [s = sizes_of(in[0], in[1], in[2], scale_), &g = gemm_engine(mixed_), q = in[0].data<float>(),
                      k = in[1].data<float>(), v = in[2].data<float>(), starts = in[3].data<int32_t>(),
                      d_out = in[4].data<float>(), d_q = out[0].data<float>(), d_k = out[1].data<float>(),
                      d_v = out[2].data<float>()] { run_backward(g, s, q, k, v, starts, d_out, d_q, d_k, d_v); });
  }

 private:
  float scale_;
  bool mixed_;
};

std::vector<mx::array> checked(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& starts) {
  std::vector<mx::array> in{plain_input(q, 4, "document_attention: q"), plain_input(k, 4, "document_attention: k"),
                            plain_input(v, 4, "document_attention: v"),
                            plain_input(starts, 2, "document_attention: starts", mx::int32)};
  require(q.shape(0) == k.shape(0) && q.shape(1) == k.shape(1) && q.shape(3) == k.shape(3) &&
              k.shape(0) == v.shape(0) && k.shape(1) == v.shape(1) && k.shape(2) == v.shape(2) && k.shape(2) > 0 &&
              q.shape(2) % k.shape(2) == 0 && starts.shape(0) == q.shape(0) && starts.shape(1) == q.shape(1) &&
              q.size() > 0 && v.size() > 0,
          "document_attention: expected q [B, L, H, D], k [B, L, H / G, D], v [B, L, H / G, V], starts [B, L]");
  return in;
}

} // namespace

mx::array document_attention(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& starts,
                             float scale, bool mixed) {
  mx::Stream stream = train_stream("document_attention");
  mx::Shape shape = q.shape();
  auto in = checked(q, k, v, starts);
  shape[3] = v.shape(3);
  return mx::array(shape, mx::float32, std::make_shared<Attention>(stream, scale, mixed), in);
}

std::vector<mx::array> document_attention_vjp(const mx::array& q, const mx::array& k, const mx::array& v,
                                              const mx::array& starts, const mx::array& d_out, float scale, bool mixed) {
  mx::Stream stream = train_stream("document_attention_vjp");
  auto in = checked(q, k, v, starts);
  mx::Shape shape = q.shape();
  shape[3] = v.shape(3);
  require(d_out.shape() == shape, "document_attention_vjp: expected a cotangent of the shape of the result");
  in.push_back(plain_input(d_out, 4, "document_attention_vjp: the cotangent"));
  return mx::array::make_arrays({q.shape(), k.shape(), v.shape()}, std::vector<mx::Dtype>(3, mx::float32),
                                std::make_shared<AttentionVjp>(stream, scale, mixed), in);
}

} // namespace edger1
