// Norms, softmax, reductions and activations over the last axis as lazy MLX operations. Each gives MLX's own operation where
// it has nothing better: another axis, dtype or device.
#pragma once

#include <variant>

#include "ops_common.h"

namespace edger1 {

using Axes = std::variant<std::monostate, int, std::vector<int>>;

mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& weight, float eps, mx::StreamOrDevice s = {});
mx::array layer_norm(const mx::array& x, const std::optional<mx::array>& weight, const std::optional<mx::array>& bias,
                     float eps, mx::StreamOrDevice s = {});

mx::array softmax(const mx::array& x, const Axes& axis, bool precise = false, mx::StreamOrDevice s = {});
// Softmax of rows [..., L, S] where row l sees its first S - L + l + 1 elements and has 0 beyond. CPU and float32 only.
mx::array causal_softmax(const mx::array& x, mx::Stream s);
// y * (dy - sum(y dy)): the gradient through a softmax whose result was y.
mx::array softmax_vjp(const mx::array& y, const mx::array& dy, mx::Stream s);
mx::array logsumexp(const mx::array& x, const Axes& axis, bool keepdims = false, mx::StreamOrDevice s = {});
mx::array argmax(const mx::array& x, std::optional<int> axis, bool keepdims = false, mx::StreamOrDevice s = {});

mx::array activation(Unary op, const mx::array& x, mx::StreamOrDevice s = {});
// f(gate) * x; swiglu_oai clips both to `limit` and scales the sigmoid's argument by `alpha`.
mx::array gated(Gate op, const mx::array& gate, const mx::array& x, float alpha = 1.702f, float limit = 7.0f,
                mx::StreamOrDevice s = {});

} // namespace edger1
