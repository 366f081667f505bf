// Rows of a quantized embedding as a lazy MLX operation.
#pragma once

#include <optional>

#include "primitive.h"

namespace edger1 {

// Row id of an affine quantized table for each of the ids (int32 or uint32, any shape), in float32: shape [*ids, columns].
// Negative ids count from the end; one that is out of range gives NaN. Nothing for what it does not cover: another dtype, arrays
// that are not evaluated and contiguous, arrays being differentiated. Throws std::invalid_argument for scales or biases
// that do not fit.
std::optional<mx::array> embed_rows(const mx::array& ids, const mx::array& w, const mx::array& scales,
                                    const mx::array& biases, int group_size, int bits);

} // namespace edger1
