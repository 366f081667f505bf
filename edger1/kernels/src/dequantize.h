// Rows looked up in a quantized matrix, as MLX arrays: what an embedding does.
#pragma once

#include <optional>
#include <string>

#include "cpu_features.h"
#include "dequantize_ops.h"
#include "ops_common.h"

namespace edger1 {

// The rows `indices` (an integer array of any shape [...]) of w [R, C * bits / 32] (uint32) with scales and biases
// [R, C / group], dequantized in float32: [..., C]. A negative index counts from the end. CPU only; throws
// std::invalid_argument where shapes or dtypes do not fit, and an index beyond is an error when it is evaluated.
mx::array dequantized_rows(const mx::array& w, const mx::array& scales, const std::optional<mx::array>& biases,
                           const mx::array& indices, int group, int bits, const std::string& mode,
                           mx::StreamOrDevice s = {});

// Throws std::invalid_argument unless w, scales and biases are quantized rows; returns how many values a row has.
int quantized_columns(const char* what, const mx::array& w, const mx::array& scales,
                      const std::optional<mx::array>& biases, int group, int bits, const std::string& mode);

} // namespace edger1
