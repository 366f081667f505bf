// What processors with matrix tiles for bf16 (AMX) do better than by way of f32 while many rows pass a layer.
#pragma once

#include <cstdint>

#include "ops_table.h"
#include "qmm_kernels.h"

namespace edger1 {

// Queries of all heads that share a key head, at `length` positions from `first` on, against the keys 0 .. their own
// position.
struct AttentionSlice {
  const float* queries = nullptr; // [group][length][dim], heads head_stride apart
  int64_t head_stride = 0;
  int group = 1, length = 1, first = 0, dim = 0;
  float scale = 1;
  const float* keys = nullptr;    // [positions][dim]
  const float* values = nullptr;
  float* out = nullptr;           // [length][group][dim], positions out_stride apart
  int64_t out_stride = 0;
};

struct TileOps {
  // How many positions a slice should have, and what working memory it takes.
  int (*slice_length)(int group);
  int64_t (*slice_bytes)(int group, int length, int dim);
  void (*attend)(const AttentionSlice& slice, void* scratch);

  // Products as QmmKernels::panel_fast computes them, of m packed rows and n0 <= n < n1 <= n0 + kPanel, with what follows.
  // out = base + factor * (product + bias); rows of both are `stride` floats apart.
  void (*product_add)(const QuantMatrix& w, const float* bias, const void* packed_x, int m, int n0, int n1,
                      const float* base, float factor, float* out, int64_t stride, void* scratch);
  // activation(gates) * (product + bias), gates [m][kPanel], as packed columns n0 .. n1 - 1 of a product's tiles.
  void (*product_gate)(const QuantMatrix& w, const float* bias, const void* packed_x, int m, int n0, int n1,
                       Gate activation, const float* gates, void* packed, int64_t tile_bytes, void* scratch);
};

// Null where there are no such tiles.
const TileOps* tile_ops();

} // namespace edger1
