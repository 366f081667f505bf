// Rotary position embedding as a lazy MLX operation.
#pragma once

#include <memory>
#include <variant>
#include <vector>

#include "ops_common.h"

namespace edger1 {

// Cosines, then sines, of every angle: [T, half] each.
struct Angles {
  int offset, length;
  float scale;
  std::vector<float> inverse_freqs;
  std::vector<float> table;

  const float* cosines(int t) const {
    return table.data() + static_cast<size_t>(t) * inverse_freqs.size();
  }
  const float* sines(int t) const {
    return cosines(t + length);
  }
};

// The angles of positions offset .. offset + length - 1; tables of recent calls are kept for each thread.
std::shared_ptr<const Angles> angles_for(int offset, int length, float scale, const std::vector<float>& inverse_freqs);

// The i-th of `half` inverse frequencies of a base, as MLX rounds it.
float inverse_frequency(float base, int i, int half);

// As mx.fast.rope: x [B, ..., T, D], the first `dims` of D rotated; offset a number, or an integer array of one or B
// elements; `freqs` [dims / 2] instead of `base`.
mx::array rope(const mx::array& x, int dims, bool traditional, std::optional<float> base, float scale,
               const std::variant<int, mx::array>& offset, const std::optional<mx::array>& freqs = std::nullopt,
               mx::StreamOrDevice s = {});

} // namespace edger1
