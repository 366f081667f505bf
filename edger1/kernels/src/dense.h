// Dense matrix products as lazy MLX operations. Each gives MLX's own operation where it has nothing better.
#pragma once

#include "ops_common.h"

namespace edger1 {

// a @ b in float32, bfloat16 or float16, mixed as they come (nothing is converted in memory).
mx::array dense_matmul(const mx::array& a, const mx::array& b, mx::StreamOrDevice s = {});
// beta * c + alpha * (a @ b)
mx::array dense_addmm(const mx::array& c, const mx::array& a, const mx::array& b, float alpha = 1, float beta = 1,
                      mx::StreamOrDevice s = {});
// a[lhs_indices[i]] @ b[rhs_indices[i]] for each i.
mx::array dense_gather_mm(const mx::array& a, const mx::array& b, const std::optional<mx::array>& lhs_indices,
                          const std::optional<mx::array>& rhs_indices, bool sorted_indices, mx::StreamOrDevice s = {});

} // namespace edger1
