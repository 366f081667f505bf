// The routed experts of a layer as lazy MLX operations: with given indices and weights, or with the router before them.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arrivals.h"
#include "describe_matrix.h"
#include "experts_plan.h"
#include "primitive.h"

namespace edger1 {

struct ExpertsSettings {
  std::string activation = "swiglu"; // a name of ExpertActivation
  float alpha = 1.702f, limit = 7.0f;
  std::string precision = "exact";   // or "fast"
};

struct RouterSettings {
  int ranks = 0;
  std::string score = "softmax";     // or "sigmoid", "logits"
  std::string group_score = "none";  // or "best", "best_two"
  int groups = 1, groups_kept = 1;
  bool softmax_chosen = false, normalize = false;
  float epsilon = 0, scale = 1;
};

// Bytes that somebody else owns.
struct Bytes {
  const void* data = nullptr;
  int64_t size = 0;
};

// Describes the experts piece by piece. Arrays are evaluated and kept, not copied (where their rows are contiguous): a bank
// whose slots are overwritten in place is read as it is when an operation runs. Each function throws std::invalid_argument,
// with what was given and expected, for what cannot be.
class Experts {
 public:
  explicit Experts(const ExpertsSettings& settings);

  // `name` is gate, up or down. w [E, n, k] is plain floats, or uint32 codes as mx.quantize packs them if there are scales
  // [E, n, k / group]; bias is [E, n]. With `in_place` they are a bank's: an array with gaps between its rows, of which a copy
  // would have to be made, is refused.
  void project(const std::string& name, const mx::array& w, const std::optional<mx::array>& scales,
               const std::optional<mx::array>& biases, const std::optional<mx::array>& bias, const Quantization& q,
               bool in_place = false);
  // The same where every expert lies elsewhere: codes (or floats), scales, biases of expert e in `codes[e]` and so on, row
  // after row without gaps. `type` is the dtype of scales and biases, or of plain weights; mxfp4 has no biases, and its
  // scales are uint8 whatever `type` is. Addresses are multiples of the size of what lies there. All of it stays where it
  // is as long as `owner` lives, which queued operations hold too.
  void project_mapped(const std::string& name, int n, int k, mx::Dtype type, const std::vector<Bytes>& codes,
                      const std::vector<Bytes>& scales, const std::vector<Bytes>& biases,
                      const std::optional<mx::array>& bias, const std::optional<Quantization>& q,
                      std::shared_ptr<const void> owner);
  // Further experts behind those that a projection has, of the same shape and types, each somewhere else as with
  // project_mapped. If there are E0 of the former, index E0 + e names codes[e]. `bias` is none or as many, in the type of the
  // bias that there is.
  void append_mapped(const std::string& name, const std::vector<Bytes>& codes, const std::vector<Bytes>& scales,
                     const std::vector<Bytes>& biases, const std::vector<Bytes>& bias, std::shared_ptr<const void> owner);
  // `name` is router (w [experts, hidden]), shared_gate, shared_up, shared_down or shared_weight (w [1, hidden]).
  void project_dense(const std::string& name, const mx::array& w, const std::optional<mx::array>& scales,
                     const std::optional<mx::array>& biases, const std::optional<mx::array>& bias,
                     const Quantization& q);
  void router(const RouterSettings& settings, const std::optional<mx::array>& correction);
  // Checks that the pieces fit together; nothing can be called before it, nothing added after it.
  void finish();

  // x [..., hidden] float32, indices [..., ranks] integers, weights [..., ranks] or [..., ranks, 1] float32: what the experts
  // give, [..., hidden], or [..., ranks, hidden] without weights. Nothing where this does not apply: another dtype or device,
  // an array being differentiated. An index that names no expert is an error at evaluation.
  //
  // With `arrivals` the indices are slots: see run_experts for what is waited for, and what is given where that is in vain.
  std::optional<mx::array> operator()(const mx::array& x, const mx::array& indices, const std::optional<mx::array>& weights,
                                      std::shared_ptr<Arrivals> arrivals = nullptr) const;
  // The same with the shared expert, as layer() adds it to what its router chose, and like that for up to 16 rows only.
  std::optional<mx::array> given(const mx::array& x, const mx::array& indices, const mx::array& weights,
                                 std::shared_ptr<Arrivals> arrivals = nullptr) const;
  // What given() answers, from `ranks` [..., ranks, hidden] float32: what this gave for the same x without weights, in one
  // call or in several.
  std::optional<mx::array> summed(const mx::array& x, const mx::array& ranks, const mx::array& weights) const;
  // The whole layer, router first and the shared expert last. With a shared expert for up to 16 rows only, and never where
  // the experts are not as many as the router's.
  std::optional<mx::array> layer(const mx::array& x) const;
  // The layer without the shared expert, for any number of rows.
  std::optional<mx::array> routed(const mx::array& x) const;
  // Indices (uint32) and weights [..., ranks] that the layer chooses.
  std::optional<std::pair<mx::array, mx::array>> route(const mx::array& x) const;

  const ExpertsPlan& plan() const {
    return held_->plan;
  }

  struct Held {
    ExpertsPlan plan;
    KeptArrays arrays;
    std::vector<std::shared_ptr<const void>> owners;
  };

 private:
  const float* keep_floats(const mx::array& a, const mx::Shape& shape, const std::string& what);
  const char* keep_bias(ExpertProjection& p, const mx::array& bias, int experts, const std::string& name);
  ExpertProjection& projection(const std::string& name);
  bool applies(const mx::array& x) const;
  std::optional<mx::array> computed(const mx::array& x, const mx::array& indices, const std::optional<mx::array>& weights,
                                    bool with_shared, std::shared_ptr<Arrivals> arrivals) const;

  std::shared_ptr<Held> held_;
  bool finished_ = false;
};

} // namespace edger1
