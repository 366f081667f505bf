// One decoder layer of a language model, or its attention, as plain pointers and numbers; knows nothing of MLX's graph.
//
//   h = x + r * post(o(attention(rope(norm(q(n))), rope(norm(k(n))), v(n)))),   n = norm(x)
//   y = h + r * post(down(act(gate(m)) * up(m))),                               m = norm(h), or n where both are parallel
//
// Every norm and the rotation are optional, as are biases. A layer whose second line is something else stops at h and
// gives m too; without residual, h is what attention alone adds. Everything is float32 but the weights.
#pragma once

#include <cstdint>
#include <vector>

#include "decoder_attention.h"
#include "ops_table.h"
#include "qmm_kernels.h"

namespace edger1 {

// A matrix [n, k] that rows are multiplied with: quantized, or plain floats.
struct Projection {
  bool quantized = false;
  QuantMatrix w;
  const void* plain = nullptr;
  Float plain_type = Float::f32;
  int64_t plain_stride = 0;          // in elements
  const float* bias = nullptr;       // [n] or null
  int n = 0;
  int k = 0;
  int form = 0;                      // which of its input's prepared forms it reads; set by finish_plan

  int64_t row_bytes() const;
  // What a row takes in the form that multiply reads.
  int64_t prepared_bytes(bool fast) const;
  // Columns [n0, n1) of the results of m rows in one prepared form, `stride` bytes apart.
  void multiply(bool fast, const char* prepared, int64_t stride, int m, int n0, int n1, float* const* out) const;
};

struct NormPlan {
  const float* weight = nullptr;     // null: no norm here
  float eps = 0;
  bool centered = false;             // a layer norm, else an RMS norm
  const float* bias = nullptr;       // of a layer norm, or null
};

struct DecoderPlan {
  bool fast = false;
  int hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, inner = 0;
  Projection q, k, v, o, gate, up, down;
  NormPlan attention_norm, q_norm, k_norm, attention_post_norm, mlp_norm, mlp_post_norm;
  bool whole_width_norms = false;    // q_norm and k_norm are over all heads together
  bool norms_after_rope = false;
  bool residual = true;
  bool parallel = false;
  bool has_mlp = true;
  const float* sinks = nullptr;      // [heads] or null
  float soft_cap = 0;                // of attention's scores; 0 for none
  int rope_dims = 0;                 // 0: no rotation
  bool rope_interleaved = false;
  float rope_scale = 1;              // of positions
  float rope_multiplier = 1;         // of the rotated elements, before they are rotated
  std::vector<float> inverse_freqs;  // [rope_dims / 2]
  float attention_scale = 1;
  float residual_scale = 1;
  Gate activation = Gate::swiglu;

  // Representatives of the different forms in which rows are prepared for q, k, v; o; gate, up; down.
  std::vector<Projection> forms[4];
};

// Decides which projections of a stage can share prepared rows.
void finish_plan(DecoderPlan& plan);

// What one evaluation works on: batch * length <= kMaxRows rows.
struct DecoderCall {
  int batch = 1, length = 1;
  const float* x = nullptr;          // [batch * length, hidden], rows x_stride apart
  int64_t x_stride = 0;
  float* out = nullptr;              // [batch * length, hidden]; may be x
  float* normed = nullptr;           // the same of m; null where the plan has an MLP
  void* keys = nullptr;              // [batch, kv_heads, capacity, head_dim], written at positions offset .. offset + length - 1
  void* values = nullptr;
  Float cache_type = Float::f32;     // of keys and values; or f16
  RowFormat format{};                  // of their rows, where they are packed
  CacheOrder order;
  SlotMask mask;
  int offset = 0;                    // the first new position
  const int* first_slots = nullptr;  // [batch] or null: see CachedAttention; positions of sequence b are then that much less
};

// Layers one after the other, all of the same rows.
void run_decoder_layers(const DecoderPlan* const* plans, const DecoderCall* calls, int count);

} // namespace edger1
