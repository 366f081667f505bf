// Multi-head latent attention as lazy MLX operations; the plan's arithmetic is in latent_plan.h.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "describe_matrix.h"
#include "latent_plan.h"
#include "primitive.h"

namespace edger1 {

struct LatentSettings {
  int heads = 0, nope = 0, rope = 0, rank = 0, value = 0;
  float scale = 1;
  std::string precision = "exact";   // or "fast": int8 rows where weights are quantized, and bf16 on
                                     // processors with matrix tiles
};

// Describes one layer piece by piece; every array is evaluated and kept. Each function throws std::invalid_argument, with
// what was given and expected, for what cannot be.
class LatentAttention {
 public:
  explicit LatentAttention(const LatentSettings& settings);

  // `name` is embed [heads, rank, nope] or unembed [heads, value, rank], or kv_b [heads * (nope + value), rank], of each head
  // first the rows that make keys and then those that make values: the two, or the one, are needed by all. For whole() it is
  // q_a, q, kv_a or o.
  // Without scales, w is plain floats; with them, uint32 as mx.quantize packs.
  void project(const std::string& name, const mx::array& w, const std::optional<mx::array>& scales,
               const std::optional<mx::array>& biases, const std::optional<mx::array>& bias, int group_size, int bits,
               const std::string& mode);
  // `name` is q or kv.
  void norm(const std::string& name, const mx::array& weight, float eps);
  void rope(int dims, bool interleaved, std::optional<float> base, const std::optional<mx::array>& freqs, float scale,
            float multiplier);
  // Checks that the pieces fit together; nothing can be called before it, nothing added after it. `whole` says that the
  // projections around attention are there too.
  void finish(bool whole);

  bool is_whole() const {
    return held_->plan.whole;
  }

  // q_nope [B, H, L, nope] and q_pe [B, H, L, rope], rotated and not scaled, float32; latent [B, 1, S, rank] and k_pe
  // [B, 1, S, rope] with S >= L in any float type, or latents packed as `format` says; a boolean mask (true: seen) that broadcasts to [B, 1, L, S], or causal.
  // The result is [B, L, H * value], float32. Throws std::invalid_argument for shapes or types that do not fit.
  mx::array attend(const mx::array& q_nope, const mx::array& q_pe, const mx::array& latent, const mx::array& k_pe,
                   const std::optional<mx::array>& mask, bool causal, RowFormat format = {}) const;

  // All of the layer: x [B, L, hidden] with B * L <= 16 and a cache of `offset` positions in latent [B, 1, capacity, rank]
  // and k_pe [B, 1, capacity, rope], all float32: its result and the caches with L positions more. A cache that nobody
  // else holds is written in place. Nothing where this does not apply: another shape or type, no room, an array being
  // differentiated.
  std::optional<std::tuple<mx::array, mx::array, mx::array>> layer(const mx::array& x, const mx::array& latent,
                                                                   const mx::array& k_pe, int offset,
                                                                   const std::optional<mx::array>& mask) const;

  struct Held {
    LatentPlan plan;
    KeptArrays arrays;
  };

 private:
  const float* keep_floats(const mx::array& a, int n, const std::string& what);

  std::shared_ptr<Held> held_;
  bool finished_ = false;
};

} // namespace edger1
