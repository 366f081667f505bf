// All decoder layers of a model and its last norm as one lazy MLX operation over a few rows.
//
// A token of a small model takes less time in a layer than MLX takes to pass it on to the next one. The caches that the
// operation writes come out of it as arrays of their own, one operation a layer that only hands a buffer on.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "decoder.h"

namespace edger1 {

// What the caches of all layers hold before a call, layer by layer. Without starts, layer i holds offsets[i] positions from
// slot 0 on. With starts (int32 [B], of any strides) all layers hold the same: what is in slots starts[b] .. offsets[i] - 1
// are the positions of sequence b from 0 on, and what precedes them is padding.
struct StackCaches {
  std::vector<mx::array> keys, values;
  std::vector<int> offsets;
  std::optional<mx::array> starts;
  RowFormat format{};                  // of all layers, where rows are packed
  std::vector<mx::array> after;      // further arrays that are to be evaluated before this call, whatever they are
};

class DecoderStack {
 public:
  // `norm` [hidden] may be null. Throws std::invalid_argument for layers that are not finished, have no MLP or do not
  // fit together.
  DecoderStack(const std::vector<const DecoderLayer*>& layers, const std::optional<mx::array>& norm, float eps);

  struct Result {
    mx::array out;
    std::vector<mx::array> keys, values;
  };

  // As DecoderLayer's: x [B, L, hidden] with B * L <= 16, each layer's caches [B, kv_heads, capacity, head_dim]. A layer's
  // caches may be float16 too, or packed.
  std::optional<Result> operator()(const mx::array& x, const StackCaches& caches) const;

  // Whether it applies, given caches with room for what is to come.
  bool applies(const mx::array& x, const StackCaches& caches) const;

 private:
  struct Held {
    std::vector<std::shared_ptr<const DecoderLayer::Held>> layers;
    std::vector<mx::array> arrays;
    NormPlan norm;
  };
  std::shared_ptr<Held> held_;

  friend class DecoderStackOp;
};

} // namespace edger1
