// Splits attention into pieces of work for the pool; knows nothing of MLX's graph.
#pragma once

#include "ops_table.h"

namespace edger1 {

// Queries [B, H, L, D], keys [B, H / G, S, D], values [B, H / G, S, V]: strides of the first three axes, the last is 1.
struct Strided {
  const void* data = nullptr;
  Float type = Float::f32;
  int64_t batch = 0, head = 0, row = 0;

  const void* at(int64_t b, int64_t h, int64_t r) const {
    return offset(data, type, b * batch + h * head + r * row);
  }
};

// Keys and values that are not there as numbers to be read in place: the driver asks for them block by block.
class KeySource {
 public:
  // Writes n rows of keys [n, D] and of values [n, V] from number `key` on, of key head `head` in batch row `batch`. May be
  // called by several threads at once.
  virtual void fetch(int64_t batch, int64_t head, int key, int n, float* keys, float* values) const = 0;

 protected:
  ~KeySource() = default;
};

struct AttentionJob {
  int batch, heads, kv_heads, length, keys, dim, value_dim;
  float scale;
  bool causal;                       // query l sees keys up to keys - length + l
  Strided q, k, v;
  const KeySource* source = nullptr; // in place of k and v
  const bool* keep = nullptr;        // masks [B, H, L, S] with strides, one of them or none
  const float* add = nullptr;
  int64_t mask_strides[4] = {};
  const float* sinks = nullptr;      // [H]: a score that every row of a head sees, with no value
  void* out = nullptr;               // [B, L, H, V] contiguous
  Float out_type = Float::f32;
};

void run_attention(const AttentionJob& job);

} // namespace edger1
