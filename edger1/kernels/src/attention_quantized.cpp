#include "attention_quantized.h"

#include <cstring>
#include <memory>

#include "append.h"
#include "attention_driver.h"
#include "dequantize.h"
#include "mlx/fast.h"

namespace edger1 {
namespace {

// An evaluated array of rows, as pointers.
struct Part {
  const char* data;
  int64_t strides[3];   // bytes

  explicit Part(const mx::array& a) : data(static_cast<const char*>(a.data<void>())) {
    for (int i = 0; i < 3; i++) {
      strides[i] = a.strides(i) * static_cast<int64_t>(a.itemsize());
    }
  }
  const char* at(int64_t b, int64_t h, int64_t r) const {
    return data + b * strides[0] + h * strides[1] + r * strides[2];
  }
};

struct QuantizedRows {
  Part codes, scales, biases;
  Float type;
  int group, bits, columns;

  void fetch(int64_t b, int64_t h, int key, int n, float* out) const {
    for (int i = 0; i < n; i++) {
      QuantizedRow row{reinterpret_cast<const uint8_t*>(codes.at(b, h, key + i)), scales.at(b, h, key + i),
                       biases.at(b, h, key + i), type, group, bits, false};
      dequantize_ops().row(out + int64_t{i} * columns, row, columns);
    }
  }
};

struct QuantizedSource final : KeySource {
  QuantizedRows keys, values;

  QuantizedSource(const QuantizedRows& k, const QuantizedRows& v) : keys(k), values(v) {}
  void fetch(int64_t b, int64_t h, int key, int n, float* k, float* v) const override {
    keys.fetch(b, h, key, n, k);
    values.fetch(b, h, key, n, v);
  }
};

struct QuantizedKind {
  float scale;
  bool causal, masked;
  int group, bits;
  bool operator==(const QuantizedKind&) const = default;
};

// Inputs q, three of k, three of v, then a mask [B, H, L, S] (bool or float32) where the kind has one.
class QuantizedAttention : public DensePrimitive {
 public:
  QuantizedAttention(mx::Stream s, QuantizedKind kind) : DensePrimitive(s), kind_(kind) {}

  const char* name() const override {
    return "EdgeR1QuantizedAttention";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return kind_ == static_cast<const QuantizedAttention&>(other).kind_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape[3] = inputs[4].shape(3) * 32 / kind_.bits;
    return {shape};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    mx::Stream s = stream();
    auto whole = [&](int i) {
      auto wide = [&](const mx::array& a) { return mx::astype(a, in[0].dtype(), s); };
      return mx::dequantize(in[i], wide(in[i + 1]), wide(in[i + 2]), kind_.group, kind_.bits, "affine", std::nullopt,
                            std::nullopt, s);
    };
    return {mx::fast::scaled_dot_product_attention(in[0], whole(1), whole(4), kind_.scale, kind_.causal ? "causal" : "",
                                                   kind_.masked ? std::optional(in[7]) : std::nullopt, std::nullopt,
                                                   false, s)};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const auto& q = inputs[0];
    auto& out = outputs[0];
    AttentionJob job{};
    job.batch = q.shape(0);
    job.heads = q.shape(1);
    job.kv_heads = inputs[1].shape(1);
    job.length = q.shape(2);
    job.keys = inputs[1].shape(2);
    job.dim = q.shape(3);
    job.value_dim = out.shape(3);
    job.scale = kind_.scale;
    job.causal = kind_.causal;
    job.q = {q.data<void>(), float_of(q.dtype()), q.strides(0), q.strides(1), q.strides(2)};
    // Stored as [B, L, H, V], which is what the projection after it wants as rows.
    int64_t row = int64_t{job.heads} * job.value_dim;
    bool plain = job.length == 1 || job.heads == 1;
    out.set_data(mx::allocator::malloc(out.nbytes()), out.size(), {job.length * row, job.value_dim, row, 1},
                 {true, plain, out.size() == 1 || (plain && out.flags().col_contiguous)});
    job.out = out.data<void>();
    job.out_type = float_of(out.dtype());
    if (kind_.masked) {
      const auto& mask = inputs[7];
      job.keep = mask.dtype() == mx::bool_ ? mask.data<bool>() : nullptr;
      job.add = mask.dtype() == mx::bool_ ? nullptr : mask.data<float>();
      for (int i = 0; i < 4; i++) {
        job.mask_strides[i] = mask.strides(i);
      }
    }
    auto rows = [&](int i, int columns) {
      Part parts[3] = {Part(with_rows(inputs[i])), Part(with_rows(inputs[i + 1])), Part(with_rows(inputs[i + 2]))};
      return QuantizedRows{parts[0], parts[1], parts[2], float_of(inputs[i + 1].dtype()), kind_.group, kind_.bits, columns};
    };
    QuantizedSource source(rows(1, job.dim), rows(4, job.value_dim));
    std::vector<mx::array> held(inputs.begin() + 1, inputs.begin() + 7);
    launch(stream(), [job, source, caches = reading(held, stream()), index = stream().index]() mutable {
      ReadingDone done{caches, index};
      job.source = &source;
      run_attention(job);
    });
  }

 private:
  // `a`, or a copy whose rows are contiguous, filled before this primitive runs on the same stream.
  mx::array with_rows(const mx::array& a) {
    if (a.shape(3) == 1 || a.strides(3) == 1) {
      return a;
    }
    mx::array copy(a.shape(), a.dtype(), nullptr, {});
    allocate(copy);
    mx::cpu::get_command_encoder(stream()).add_temporary(copy);
    launch(stream(), [map = RowMap(a, 1), from = a.data<char>(), to = copy.data<char>(), n = a.shape(3),
                      step = a.strides(3), size = a.itemsize()] {
      for (int64_t r = 0; r < map.rows(); r++) {
        for (int64_t i = 0; i < n; i++) {
          std::memcpy(to + (r * n + i) * size, from + (map(r) + i * step) * size, size);
        }
      }
    });
    return copy;
  }

  QuantizedKind kind_;
};


} // namespace

bool covers_quantized_attention(const mx::array& q, const Quantized& k, const Quantized& v, const Mask& mask, int group,
                                int bits, mx::StreamOrDevice s) {
  bool known = (bits >= 2 && bits <= 8 && bits != 7) && (group == 32 || group == 64 || group == 128);
  if (!on_cpu(s) || !known || q.ndim() != 4 || !is_float(q.dtype()) || q.size() == 0) {
    return false;
  }
  for (const Quantized* side : {&k, &v}) {
    const auto& [codes, scales, biases] = *side;
    if (codes.ndim() != 4 || codes.dtype() != mx::uint32 || scales.ndim() != 4 || !is_float(scales.dtype()) ||
        biases.dtype() != scales.dtype() || biases.shape() != scales.shape() || codes.size() == 0 ||
        codes.shape(0) != q.shape(0) || codes.shape(1) != std::get<0>(k).shape(1) ||
        codes.shape(2) != std::get<0>(k).shape(2) || q.shape(1) % codes.shape(1) != 0) {
      return false;
    }
    int64_t columns = codes.shape(3) * 32LL / bits;
    mx::Shape expected = codes.shape();
    expected[3] = static_cast<int>(columns / group);
    if (columns % group != 0 || columns * bits != codes.shape(3) * 32LL || scales.shape() != expected) {
      return false;
    }
  }
  const auto& keys = std::get<0>(k);
  if (keys.shape(3) * 32LL / bits != q.shape(3)) {
    return false;
  }
  if (const auto* mode = std::get_if<std::string>(&mask)) {
    return *mode == "causal" && keys.shape(2) >= q.shape(2);
  }
  if (const auto* a = std::get_if<mx::array>(&mask)) {
    bool shape = (a->ndim() == 2 || (a->ndim() == 4 && a->shape(1) == 1)) &&
        (a->ndim() == 2 || a->shape(0) == 1 || a->shape(0) == q.shape(0)) &&
        (a->shape(-2) == 1 || a->shape(-2) == q.shape(2)) && (a->shape(-1) == 1 || a->shape(-1) == keys.shape(2));
    return shape && (a->dtype() == mx::bool_ || is_float(a->dtype()));
  }
  return true;
}

mx::array quantized_attention(const mx::array& q, const Quantized& k, const Quantized& v, float scale, const Mask& mask,
                              int group, int bits, mx::StreamOrDevice s) {
  mx::Stream stream = cpu_stream(s, "quantized_attention");
  if (!covers_quantized_attention(q, k, v, mask, group, bits, s)) {
    throw std::invalid_argument(
        "quantized_attention: expected queries [B, H, L, D], and keys and values [B, H / G, S, ...] as mx.quantize gives "
        "them with the given bits and group size, on the CPU");
  }
  std::vector<mx::array> inputs{mx::contiguous(q, false, stream)};
  for (const Quantized* side : {&k, &v}) {
    const auto& [codes, scales, biases] = *side;
    for (const mx::array* a : {&codes, &scales, &biases}) {
      inputs.push_back(*a);
    }
  }
  const auto* given = std::get_if<mx::array>(&mask);
  const auto* mode = std::get_if<std::string>(&mask);
  if (given) {
    auto plain = given->dtype() == mx::bool_ ? *given : mx::astype(*given, mx::float32, stream);
    inputs.push_back(mx::broadcast_to(plain, {q.shape(0), q.shape(1), q.shape(2), std::get<0>(k).shape(2)}, stream));
  }
  mx::Shape shape = q.shape();
  shape[3] = static_cast<int>(std::get<0>(v).shape(3) * 32LL / bits);
  QuantizedKind kind{scale, mode != nullptr, given != nullptr, group, bits};
  return mx::array(shape, q.dtype(), std::make_shared<QuantizedAttention>(stream, kind), std::move(inputs));
}

} // namespace edger1
