// Many rows through a decoder layer as two lazy MLX operations; see prefill_run.h for what they compute.
//
// Two, because the last layer of a prompt that nobody asks the logits of needs to fill its cache and no more: the second
// half is then never evaluated.
#pragma once

#include <optional>
#include <tuple>

#include "decoder.h"

namespace edger1 {

// x [B, L, hidden] with L > 16 and a cache of `offset` positions in keys and values [B, kv_heads, capacity, head_dim], all
// float32; without keys and values a cache of `capacity` is made. Returns the layer's result, keys and values. A cache
// that nobody else holds is written in place. Nothing where this does not apply: another shape or dtype, no room, an
// array being differentiated, a plan that is not covered.
std::optional<std::tuple<mx::array, mx::array, mx::array>> prefill_layer(const std::shared_ptr<const DecoderPlan>& plan,
                                                                         const mx::array& x,
                                                                         const std::optional<mx::array>& keys,
                                                                         const std::optional<mx::array>& values,
                                                                         int offset, int capacity);

} // namespace edger1
