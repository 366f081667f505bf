// Attention over keys and values that a cache holds quantized, as a lazy MLX operation.
#pragma once

#include <tuple>

#include "attention.h"

namespace edger1 {

// Codes (uint32), scales and biases as mx.quantize gives them, each [B, H, S, ...] of any strides but along the last axis.
using Quantized = std::tuple<mx::array, mx::array, mx::array>;

// Whether the arguments fit quantized_attention; what does not goes to mlx-lm's own function.
bool covers_quantized_attention(const mx::array& q, const Quantized& k, const Quantized& v, const Mask& mask, int group,
                                int bits, mx::StreamOrDevice s = {});

// Queries [B, H, L, D] over affine-quantized keys [B, H / G, S, D] and values [B, H / G, S, V], in the dtype of q. Keys and
// values are read back in blocks of 256, never as a whole. The mask: none, "causal", or bool or float [L, S] or
// [B or 1, 1, L, S]. Throws std::invalid_argument for what covers_quantized_attention does not cover.
mx::array quantized_attention(const mx::array& q, const Quantized& k, const Quantized& v, float scale, const Mask& mask,
                              int group, int bits, mx::StreamOrDevice s = {});

} // namespace edger1
