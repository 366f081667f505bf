// A dense decoder layer as one lazy MLX operation over a few rows, with the KV cache written in place.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "decoder_plan.h"
#include "primitive.h"

namespace edger1 {

struct DecoderSettings {
  int heads = 0, kv_heads = 0, head_dim = 0;
  float attention_scale = 1, residual_scale = 1;
  std::string activation = "swiglu"; // or "geglu", "geglu_approx"
  std::string precision = "exact";   // or "fast"
};

// Describes a layer piece by piece; every array is evaluated and kept. Each function throws std::invalid_argument, with
// what was given and expected, for what cannot be.
class DecoderLayer {
 public:
  explicit DecoderLayer(const DecoderSettings& settings);

  // `name` is q, k, v, o, gate, up or down. Without scales, w is plain floats [n, k]; with them, uint32 as mx.quantize packs.
  void project(const std::string& name, const mx::array& w, const std::optional<mx::array>& scales,
               const std::optional<mx::array>& biases, const std::optional<mx::array>& bias, int group_size, int bits,
               const std::string& mode);
  // `name` is attention, q, k, attention_post, mlp or mlp_post.
  void norm(const std::string& name, const mx::array& weight, float eps);
  void rope(int dims, bool interleaved, std::optional<float> base, const std::optional<mx::array>& freqs, float scale,
            float multiplier);
  // Checks that the pieces fit together; nothing can be called before it, nothing added after it.
  void finish();

  // x [B, L, hidden] with B * L <= 16 and a cache of `offset` positions in keys and values [B, kv_heads, capacity,
  // head_dim], all float32: the layer's result and the caches with L positions more. A cache that nobody else holds is
  // written in place. Nothing where this does not apply: another shape or dtype, no room, an array being differentiated.
  std::optional<std::tuple<mx::array, mx::array, mx::array>> operator()(const mx::array& x, const mx::array& keys,
                                                                        const mx::array& values, int offset) const;

 private:
  mx::array keep(const mx::array& a);
  const float* keep_floats(const mx::array& a, int n, const std::string& what);
  Projection& projection(const std::string& name);

  struct Held {
    DecoderPlan plan;
    std::vector<mx::array> arrays;
  };
  std::shared_ptr<Held> held_;
  bool finished_ = false;

  friend class DecoderLayerOp;
};

} // namespace edger1
