// Rotary position embedding as a lazy MLX operation.
#pragma once

#include <variant>

#include "ops_common.h"

namespace edger1 {

// As mx.fast.rope: x [B, ..., T, D], the first `dims` of D rotated; offset a number, or an integer array of one or B
// elements; `freqs` [dims / 2] instead of `base`.
mx::array rope(const mx::array& x, int dims, bool traditional, std::optional<float> base, float scale,
               const std::variant<int, mx::array>& offset, const std::optional<mx::array>& freqs = std::nullopt,
               mx::StreamOrDevice s = {});

} // namespace edger1
