// One dense decoder layer over many rows, in two halves that the rows of one prompt pass one after the other; knows
// nothing of MLX's graph. The layer is that of decoder_plan.h with all of its matrices quantized.
//
// What lies between the matrices happens where it is still in the cache: rows are normed as they are packed for a
// product, queries and keys are rotated, gates applied and residuals added panel by panel.
#pragma once

#include "decoder_plan.h"

namespace edger1 {

// [batch * length, ...] rows; see the two functions for who reads what.
struct PrefillCall {
  int batch = 1, length = 1;
  int offset = 0;                 // positions in the cache before these
  int capacity = 0;
  const float* x = nullptr;       // [batch, length, hidden]
  float* queries = nullptr;       // [batch, heads, length, head_dim], rotated
  float* keys = nullptr;          // [batch, kv_heads, capacity, head_dim]
  float* values = nullptr;
  float* out = nullptr;           // [batch, length, hidden]
};

// Whether the two functions below compute what the plan says.
bool prefill_covers(const DecoderPlan& plan);

// From x: queries, and keys and values of the new positions, written at `offset` of the cache.
void prefill_queries(const DecoderPlan& plan, const PrefillCall& call);

// The rest of the layer, from x, queries and the cache: out.
void prefill_rest(const DecoderPlan& plan, const PrefillCall& call);

} // namespace edger1
