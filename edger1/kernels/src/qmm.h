// Quantized matmul as lazy MLX operations.
#pragma once

#include <optional>
#include <string>

#include "primitive.h"
#include "qmm_kernels.h"

namespace edger1 {

struct QuantMode {
  int group = 64;
  int bits = 4;
  bool fp4 = false;
  bool transpose = true;
  bool fast = false;
  float bias_ratio = 0;

  bool operator==(const QuantMode&) const = default;
};

// x[..., K] @ W[N, K]^T (transpose) or x[..., N] @ W[N, K]; w may have batch axes that broadcast against x's. Throws
// std::invalid_argument, with what was given and expected, for shapes or dtypes that do not fit. `fast` speaks of the
// transposed product only; the other one is always computed with f32 activations. `bias_ratio` is what bias_ratio() has
// found, or 0.
mx::array qmm(const mx::array& x, const mx::array& w, const mx::array& scales, const std::optional<mx::array>& biases,
              bool transpose, int group_size, int bits, const std::string& mode, const std::string& precision,
              float bias_ratio = 0, mx::StreamOrDevice s = {});

// What multiplies the scales of one evaluated affine matrix to its biases, if all of these follow from them so (see
// find_bias_ratio); else 0, also for arrays that are not evaluated.
float bias_ratio(const mx::array& w, const mx::array& scales, const mx::array& biases, int group_size, int bits);

// As qmm for each pair of matrices x[lhs_indices[i]], w[rhs_indices[i]]. Without lhs_indices the batch axes of x itself
// broadcast against the indices. Rows that meet the same matrix are computed together, so the order of indices does not
// matter. An index that names no matrix is an error at evaluation.
mx::array gather_qmm(const mx::array& x, const mx::array& w, const mx::array& scales,
                     const std::optional<mx::array>& biases, const std::optional<mx::array>& lhs_indices,
                     const std::optional<mx::array>& rhs_indices, bool transpose, int group_size, int bits,
                     const std::string& mode, const std::string& precision, mx::StreamOrDevice s = {});

} // namespace edger1
