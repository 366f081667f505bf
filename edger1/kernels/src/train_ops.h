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

// out[t] = sum_r shares[t, r] down[e] (silu(gate[e] x[t]) * up[e] x[t]) with e = indices[t, r], summed in the order of e.
// x [T, D], indices uint32 [T, k], shares [T, k], gate and up [E, M, D], down [E, D, M] -> [T, D].
mx::array experts(const mx::array& x, const mx::array& indices, const mx::array& shares, const mx::array& gate,
                  const mx::array& up, const mx::array& down, bool mixed);
// Gradients of x, shares, gate, up and down for d_out [T, D].
std::vector<mx::array> experts_vjp(const mx::array& x, const mx::array& indices, const mx::array& shares,
                                   const mx::array& gate, const mx::array& up, const mx::array& down,
                                   const mx::array& d_out, bool mixed);

// sum_t weights[t] (log sum exp(head x[t]) - head[targets[t]] x[t]) and its gradients by x [T, D] and head [V, D]; the
// logits of all t never exist at once. targets int32 [T], weights [T]. Returns {[], [T, D], [V, D]}.
std::vector<mx::array> cross_entropy(const mx::array& x, const mx::array& head, const mx::array& targets,
                                     const mx::array& weights, bool mixed);

// Causal attention within documents: position i of row b sees starts[b, i] .. i. q [B, L, H, D], k [B, L, H / G, D],
// v [B, L, H / G, V], starts int32 [B, L], constant over a document -> [B, L, H, V].
mx::array document_attention(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& starts,
                             float scale, bool mixed);
// Gradients of q, k and v.
std::vector<mx::array> document_attention_vjp(const mx::array& q, const mx::array& k, const mx::array& v,
                                              const mx::array& starts, const mx::array& d_out, float scale, bool mixed);

// One step of AdamW: new weights and both moments.
std::vector<mx::array> adamw(const mx::array& w, const mx::array& g, const mx::array& m, const mx::array& v,
                             float gradient_scale, float rate, float beta1, float beta2, float epsilon, float decay,
                             float first, float second);
// a x + b y, all f32 of one shape.
mx::array blend(const mx::array& x, float a, const mx::array& y, float b);
// The sum of squares of a f32 array, as a f32 scalar.
mx::array squared_norm(const mx::array& x);

} // namespace edger1
