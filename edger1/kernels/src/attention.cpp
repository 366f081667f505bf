#include "attention.h"

#include <memory>

#include "append.h"
#include "attention_driver.h"
#include "dense.h"
#include "mlx/fast.h"
#include "rows.h"

namespace edger1 {
namespace {

struct AttentionKind {
  float scale;
  bool causal, masked, sinks;
  bool operator==(const AttentionKind&) const = default;
};

Strided strided(const mx::array& a) {
  return {a.data<void>(), float_of(a.dtype()), a.strides(0), a.strides(1), a.strides(2)};
}

// Inputs q, k, v, then a mask [B, H, L, S] (bool or float32) and sinks [H] (float32) where the kind has them.
class Attention : public DensePrimitive {
 public:
  Attention(mx::Stream s, AttentionKind kind) : DensePrimitive(s), kind_(kind) {}

  const char* name() const override {
    return "EdgeR1Attention";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return kind_ == static_cast<const Attention&>(other).kind_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape[3] = inputs[2].shape(3);
    return {shape};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    return {mx::fast::scaled_dot_product_attention(
        in[0], in[1], in[2], kind_.scale, kind_.causal ? "causal" : "", kind_.masked ? std::optional(in[3]) : std::nullopt,
        kind_.sinks ? std::optional(in.back()) : std::nullopt, false, stream())};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const auto &q = inputs[0], &k = inputs[1], &v = inputs[2];
    auto& out = outputs[0];
    AttentionJob job{};
    job.batch = q.shape(0);
    job.heads = q.shape(1);
    job.kv_heads = k.shape(1);
    job.length = q.shape(2);
    job.keys = k.shape(2);
    job.dim = q.shape(3);
    job.value_dim = v.shape(3);
    job.scale = kind_.scale;
    job.causal = kind_.causal;
    // Stored as [B, L, H, V], which is what the projection after it wants as rows.
    int64_t row = int64_t{job.heads} * job.value_dim;
    bool plain = job.length == 1 || job.heads == 1;
    out.set_data(mx::allocator::malloc(out.nbytes()), out.size(), {job.length * row, job.value_dim, row, 1},
                 {true, plain, out.size() == 1 || (plain && out.flags().col_contiguous)});
    std::vector<mx::array> rows;
    for (int i = 0; i < 3; i++) {
      rows.push_back(inputs[i].shape(3) == 1 || inputs[i].strides(3) == 1 ? inputs[i] : contiguous_now(inputs[i]));
    }
    job.q = strided(rows[0]);
    job.k = strided(rows[1]);
    job.v = strided(rows[2]);
    if (kind_.masked) {
      const auto& mask = inputs[3];
      job.keep = mask.dtype() == mx::bool_ ? mask.data<bool>() : nullptr;
      job.add = mask.dtype() == mx::bool_ ? nullptr : mask.data<float>();
      for (int i = 0; i < 4; i++) {
        job.mask_strides[i] = mask.strides(i);
      }
    }
    if (kind_.sinks) {
      job.sinks = inputs.back().data<float>();
    }
    job.out = out.data<void>();
    job.out_type = float_of(out.dtype());
    launch(stream(), [job, caches = reading({k, v}, stream()), index = stream().index] {
      ReadingDone done{caches, index};
      run_attention(job);
    });
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override {
    size_t sink = kind_.sinks ? primals.size() - 1 : primals.size();
    bool ours = true;
    for (int arg : argnums) {
      ours &= arg < 3 || static_cast<size_t>(arg) == sink;
    }
    for (int i = 0; i < 3; i++) {
      ours &= primals[i].dtype() == mx::float32;
    }
    if (!ours) {
      return DensePrimitive::vjp(primals, cotangents, argnums, outputs);
    }
    // The weights are computed again, here with all rows at once: P = softmax(q k^T), dV = P^T dO, dS = P (dP - sum(P dP)).
    mx::Stream s = stream();
    const auto &q = primals[0], &k = primals[1], &v = primals[2];
    int batch = q.shape(0), heads = q.shape(1), length = q.shape(2), dim = q.shape(3);
    int kv_heads = k.shape(1), rows = heads / kv_heads * length, keys = k.shape(2);
    mx::Shape grouped{batch, kv_heads, rows, keys}, separate{batch, heads, length, keys};
    auto queries = mx::reshape(mx::multiply(q, mx::array(kind_.scale), s), {batch, kv_heads, rows, dim}, s);
    auto d_out = mx::reshape(cotangents[0], {batch, kv_heads, rows, v.shape(3)}, s);
    auto flip = [&](const mx::array& a) { return mx::swapaxes(a, -1, -2, s); };
    auto scores = mx::reshape(dense_matmul(queries, flip(k), s), separate, s);
    if (kind_.masked) {
      scores = primals[3].dtype() == mx::bool_
          ? mx::where(primals[3], scores, mx::array(-3.4028234663852886e38f), s)
          : mx::add(scores, primals[3], s);
    }
    // A sink is a key in front of all others that every row sees and that has no value.
    mx::Shape column{batch, heads, length, 1}, beyond{batch, heads, length, keys + 1};
    if (kind_.sinks) {
      auto sinks = mx::broadcast_to(mx::reshape(primals[sink], {1, heads, 1, 1}, s), column, s);
      scores = mx::concatenate({sinks, scores}, 3, s);
    }
    auto without_sink = [&](const mx::array& a) {
      return mx::reshape(kind_.sinks ? mx::slice(a, {0, 0, 0, 1}, beyond, s) : a, grouped, s);
    };
    auto all_weights = kind_.causal ? causal_softmax(scores, s) : softmax(scores, -1, true, s);
    auto weights = without_sink(all_weights);
    auto d_weights = mx::reshape(dense_matmul(d_out, flip(v), s), separate, s);
    if (kind_.sinks) {
      d_weights = mx::concatenate({mx::zeros(column, mx::float32, s), d_weights}, 3, s);
    }
    auto all_d_scores = softmax_vjp(all_weights, d_weights, s);
    auto d_scores = without_sink(all_d_scores);
    if (kind_.masked && primals[3].dtype() == mx::bool_) {
      // A row that sees nothing weighs all keys alike, but through constants.
      auto kept = mx::where(primals[3], mx::reshape(d_scores, separate, s), mx::array(0.0f), s);
      d_scores = mx::reshape(kept, grouped, s);
    }
    std::vector<mx::array> gradients;
    for (int arg : argnums) {
      if (arg == 0) {
        auto d_q = mx::reshape(dense_matmul(d_scores, k, s), q.shape(), s);
        gradients.push_back(mx::multiply(d_q, mx::array(kind_.scale), s));
      } else if (arg == 1) {
        gradients.push_back(dense_matmul(flip(d_scores), queries, s));
      } else if (arg == 2) {
        gradients.push_back(dense_matmul(flip(weights), d_out, s));
      } else {
        auto first = mx::slice(all_d_scores, {0, 0, 0, 0}, column, s);
        gradients.push_back(mx::sum(first, std::vector<int>{0, 2, 3}, false, s));
      }
    }
    return gradients;
  }

 private:
  // A copy with contiguous rows, filled before this primitive runs on the same stream.
  mx::array contiguous_now(const mx::array& a) {
    mx::array copy(a.shape(), a.dtype(), nullptr, {});
    allocate(copy);
    Rows from(a);
    OutRows to(copy);
    mx::cpu::get_command_encoder(stream()).add_temporary(copy);
    launch(stream(), [from, to] {
      std::vector<float> scratch(2 * static_cast<size_t>(from.n));
      for (int64_t r = 0; r < from.map.rows(); r++) {
        float* row = to.place(r, scratch.data());
        const float* values = from.fetch(r, scratch.data() + from.n);
        std::copy_n(values, from.n, row);
        to.finish(r, row);
      }
    });
    return copy;
  }

  AttentionKind kind_;
};

} // namespace

mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale, const Mask& mask,
                    const std::optional<mx::array>& sinks, bool force_fused, mx::StreamOrDevice s) {
  const auto* mode = std::get_if<std::string>(&mask);
  const auto* mask_array = std::get_if<mx::array>(&mask);
  bool shapes_fit = q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4 && q.shape(3) == k.shape(3) &&
      q.shape(0) == k.shape(0) && q.shape(0) == v.shape(0) && k.shape(1) == v.shape(1) && k.shape(2) == v.shape(2) &&
      k.shape(1) > 0 && q.shape(1) % k.shape(1) == 0 && q.size() > 0 && k.size() > 0 && v.size() > 0;
  bool ours = on_cpu(s) && shapes_fit && is_float(q.dtype()) && is_float(k.dtype()) && k.dtype() == v.dtype() &&
      (!mode || *mode == "" || (*mode == "causal" && k.shape(2) >= q.shape(2))) &&
      (!mask_array || (mask_array->ndim() <= 4 && (mask_array->dtype() == mx::bool_ || is_float(mask_array->dtype())))) &&
      (!sinks || (sinks->ndim() == 1 && sinks->shape(0) == q.shape(1) && is_float(sinks->dtype())));
  if (!ours) {
    return mx::fast::scaled_dot_product_attention(q, k, v, scale, mode ? *mode : mask_array ? "array" : "",
                                                  mask_array ? std::optional(*mask_array) : std::nullopt, sinks,
                                                  force_fused, s);
  }
  mx::Stream stream = mx::to_stream(s);
  mx::Dtype dtype = mx::promote_types(q.dtype(), k.dtype());
  std::vector<mx::array> inputs{q, k, v};
  if (mask_array) {
    auto plain = mask_array->dtype() == mx::bool_ ? *mask_array : mx::astype(*mask_array, mx::float32, stream);
    inputs.push_back(mx::broadcast_to(plain, {q.shape(0), q.shape(1), q.shape(2), k.shape(2)}, stream));
  }
  if (sinks) {
    inputs.push_back(mx::contiguous(mx::astype(*sinks, mx::float32, stream), false, stream));
  }
  mx::Shape shape = q.shape();
  shape[3] = v.shape(3);
  AttentionKind kind{scale, mode && *mode == "causal", mask_array != nullptr, sinks.has_value()};
  return mx::array(shape, dtype, std::make_shared<Attention>(stream, kind), std::move(inputs));
}

} // namespace edger1
