// What training spends its time in, as lazy MLX operations on f32 arrays; each with its gradient as an operation of its
// own. `mixed` rounds the operands of products to bf16 where the processor has matrix tiles (gemm_engine.h).
#pragma once

#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace edger1 {

namespace mx = mlx::core;

// a [..., M, K] times b [K, N] or [..., K, N] with a's batch axes, rounded to bf16 where there are matrix tiles.
mx::array mixed_matmul(const mx::array& a, const mx::array& b);

// out[t] = sum_r shares[t, r] down[e] (silu(gate[e] x[t]) * up[e] x[t]) with e = indices[t, r], summed in the order of e,
// after the shared expert's where there is one. x [T, D], indices uint32 [T, k], shares [T, k]; weights are gate and up
// [E, M, D], down [E, D, M], and perhaps the shared expert's [S, D], [S, D] and [D, S] -> [T, D].
mx::array experts(const mx::array& x, const mx::array& indices, const mx::array& shares,
                  const std::vector<mx::array>& weights, bool mixed);
// Gradients of x, shares and the weights for d_out [T, D].
std::vector<mx::array> experts_vjp(const mx::array& x, const mx::array& indices, const mx::array& shares,
                                   const std::vector<mx::array>& weights, const mx::array& d_out, bool mixed);

// sum_t weights[t] (log sum exp(head x[t]) - head[targets[t]] x[t]) and its gradients by x [T, D] and head [V, D]; the
// logits of all t never exist at once. targets int32 [T], weights [T]. Returns {[], [T, D], [V, D]}.
std::vector<mx::array> cross_entropy(const mx::array& x, const mx::array& head, const mx::array& targets,
                                     const mx::array& weights, bool mixed);

struct AttentionShape {
  float scale;
  float base;       // of the rotary frequencies
  bool interleaved; // pairs to rotate are neighbours, as in DeepSeek-V3, and not halves of a head
};

// Causal attention within documents: position i of row b sees starts[b, i] .. i, and counts from 0 at its document's first.
// q [B, L, H, N + R] and kv [B, L, H / G, N + V], of which R dimensions are to be rotated; the rotated part of keys is
// apart: rope [B, L, 1 or H / G, R]. starts int32 [B, L], constant over a document -> [B, L, H, V].
mx::array document_attention(const mx::array& q, const mx::array& kv, const mx::array& rope, const mx::array& starts,
                             const AttentionShape& shape, bool mixed);
// Gradients of q, kv and rope.
std::vector<mx::array> document_attention_vjp(const mx::array& q, const mx::array& kv, const mx::array& rope,
                                              const mx::array& starts, const mx::array& d_out,
                                              const AttentionShape& shape, bool mixed);

// {x + y, RMSNorm(x + y)} of rows [..., D] with weight [D].
std::vector<mx::array> add_norm(const mx::array& x, const mx::array& y, const mx::array& weight, float eps);
// Gradients of x (and y alike) and of the weight, given the sum.
std::vector<mx::array> add_norm_vjp(const mx::array& sum, const mx::array& weight, const mx::array& d_sum,
                                    const mx::array& d_normed, float eps);
// The indices uint32 [..., chosen] of the highest scores [..., E], best first; the lower index where scores are equal.
mx::array best_experts(const mx::array& scores, int chosen);

// One step of AdamW: new weights and both moments.
std::vector<mx::array> adamw(const mx::array& w, const mx::array& g, const mx::array& m, const mx::array& v,
                             float gradient_scale, float rate, float beta1, float beta2, float epsilon, float decay,
                             float first, float second);
// Matrices, or stacks of them, of any sizes, each with its singular values brought near one by Muon's Newton-Schulz steps.
std::vector<mx::array> orthogonal(const std::vector<mx::array>& matrices, bool mixed);
// a x + b y, all f32 of one shape.
mx::array blend(const mx::array& x, float a, const mx::array& y, float b);
// The sum of squares of a f32 array, as a f32 scalar.
mx::array squared_norm(const mx::array& x);

} // namespace edger1
