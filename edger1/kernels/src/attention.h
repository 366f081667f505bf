// Scaled dot-product attention as a lazy MLX operation.
#pragma once

#include <string>
#include <variant>

#include "ops_common.h"

namespace edger1 {

using Mask = std::variant<std::monostate, std::string, mx::array>;

// As mx.fast.scaled_dot_product_attention. Queries [B, H, L, D], keys [B, H / G, S, D], values [B, H / G, S, V] of any
// strides and float types; never holds L times S numbers, except to differentiate.
mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale, const Mask& mask = {},
                    const std::optional<mx::array>& sinks = std::nullopt, bool force_fused = false,
                    mx::StreamOrDevice s = {});

} // namespace edger1
