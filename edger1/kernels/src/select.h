// Sorting and selecting along an axis. Each gives MLX's own operation where it has nothing better: another dtype or device.
#pragma once

#include <optional>

#include "ops_common.h"

namespace edger1 {

// Names and arguments are those of mlx.core; no axis means the flattened array. Ascending, stable, NaNs last. A partition
// puts every element in its place or beyond: which way it orders those on one side is the same for the same row.
mx::array sort(const mx::array& a, std::optional<int> axis, mx::StreamOrDevice s = {});
mx::array argsort(const mx::array& a, std::optional<int> axis, mx::StreamOrDevice s = {});
mx::array partition(const mx::array& a, int kth, std::optional<int> axis, mx::StreamOrDevice s = {});
mx::array argpartition(const mx::array& a, int kth, std::optional<int> axis, mx::StreamOrDevice s = {});
mx::array topk(const mx::array& a, int k, std::optional<int> axis, mx::StreamOrDevice s = {});

} // namespace edger1
