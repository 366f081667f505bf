// A decoder layer, or its attention, as one lazy MLX operation over a few rows, with the KV cache written in place.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "decoder_plan.h"
#include "describe_matrix.h"
#include "primitive.h"

namespace edger1 {

struct DecoderSettings {
  int heads = 0, kv_heads = 0, head_dim = 0;
  float attention_scale = 1, residual_scale = 1, soft_cap = 0;
  std::string activation = "swiglu"; // or "geglu", "geglu_approx"
  std::string precision = "exact";   // or "fast"
  bool parallel = false;             // the MLP takes what attention takes
  bool residual = true;
  bool norms_after_rope = false;
};

// Where the next L positions go in a cache of `capacity` slots, and which are there already: `count` positions with the new
// ones, the oldest in `first_slot`, each next one a slot further, turning to slot 0 after the last.
struct CachePlace {
  int offset = 0;                    // the first new position, as the rotation counts
  int first_slot = 0;
  std::optional<int> count;          // offset + L where not given
  // int32 [B]: what is in slots starts[b] .. offset - 1 are the positions of sequence b from 0 on, and what precedes them is
  // padding; not together with the two above.
  std::optional<mx::array> starts;
  RowFormat format{};                  // of packed rows, which are uint32 [.., capacity, format.words(head_dim)]
};

struct DecoderOutputs {
  mx::array out, keys, values;
  std::optional<mx::array> normed;   // where the layer has no MLP here: its input
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
  // `name` is attention, q, k, attention_post, mlp or mlp_post; those of q and k are [head_dim] or as wide as all heads.
  // Centered is a layer norm, else it is an RMS norm.
  void norm(const std::string& name, const mx::array& weight, float eps, bool centered,
            const std::optional<mx::array>& bias);
  void sinks(const mx::array& sinks);
  void rope(int dims, bool interleaved, std::optional<float> base, const std::optional<mx::array>& freqs, float scale,
            float multiplier);
  // Checks that the pieces fit together; nothing can be called before it, nothing added after it. Without gate, up and
  // down the layer ends after attention.
  void finish();

  // x [B, L, hidden] with B * L <= 16, keys and values [B, kv_heads, capacity, head_dim], all float32 (or packed, see CachePlace); without a mask rows see
  // what lies before them and themselves, else what a boolean or float32 mask says that can be broadcast to [B, heads, L,
  // slots in use]. A cache that nobody else holds is written in place. Nothing where this does not apply: another shape
  // or dtype, no room, an array being differentiated.
  std::optional<DecoderOutputs> operator()(const mx::array& x, const mx::array& keys, const mx::array& values,
                                           const CachePlace& place, const std::optional<mx::array>& mask) const;

  // What the layer computes, together with its arrays; null before finish().
  std::shared_ptr<const DecoderPlan> plan() const {
    return finished_ ? std::shared_ptr<const DecoderPlan>(held_, &held_->plan) : nullptr;
  }

 private:
  const float* keep_floats(const mx::array& a, int n, const std::string& what);
  Projection& projection(const std::string& name);

  struct Held {
    DecoderPlan plan;
    KeptArrays arrays;

    bool gives_normed() const {
      return !plan.has_mlp && plan.residual;
    }
  };
  std::shared_ptr<Held> held_;
  std::vector<std::pair<std::string, int>> norm_widths_;
  bool finished_ = false;

  friend class DecoderLayerOp;
  friend class DecoderStack;
};

// An array whose buffer is the caller's alone: the one of `a` where nobody else holds it, else a copy.
mx::array claim(const mx::array& a, mx::Stream stream);

} // namespace edger1
