// Attention of a few new positions over a KV cache that may be a ring, as plain pointers and numbers.
#pragma once

#include <cstdint>

#include "ops_table.h"
#include "packed_rows.h"
#include "pool.h"

namespace edger1 {

// Where positions lie in a cache [batch, kv_heads, capacity, head_dim]: the oldest one in slot `first_slot`, each next one
// slot further, going on at slot 0 after the last.
struct CacheOrder {
  int first_position = 0;
  int first_slot = 0;
  int capacity = 0;

  int slot(int position) const {
    int at = first_slot + position - first_position;
    return at < capacity ? at : at - capacity;
  }
};

// What keys a row sees, as a boolean (keep where true) or additive mask over [batch, heads, rows, slots], strides in elements;
// with neither a row sees what lies before it, and itself.
struct SlotMask {
  const bool* keep = nullptr;
  const float* add = nullptr;
  int64_t strides[4] = {0, 0, 0, 0};
};

struct CachedAttention {
  int batch = 1, length = 1, heads = 0, kv_heads = 0, dim = 0;
  const float* queries = nullptr;  // scaled; [batch, kv_heads, heads / kv_heads, length, dim]
  const void* keys = nullptr;      // [batch, kv_heads, capacity, dim], the new positions among them
  const void* values = nullptr;
  Float type = Float::f32;         // of keys and values
  RowFormat format{};                // of their rows, where they are packed
  CacheOrder order;
  int end = 0;                     // the position after the last
  // [batch] or null: sequence b begins in slot first_slots[b] < end with position 0, and ends in slot end - 1. `order` is
  // then that of a sequence that begins in slot 0.
  const int* first_slots = nullptr;
  SlotMask mask;
  const float* sinks = nullptr;    // [heads] or null
  float soft_cap = 0;              // of scores; 0 for none
  float* out = nullptr;            // [batch, length, heads, dim]

  // How many floats of working memory attend() needs.
  int64_t scratch_floats() const;
};

// Attention in pieces that any thread may compute. Positions are split into blocks that begin at multiples of a fixed size,
// whatever the oldest one is and wherever it lies, and merged in their order: a position's result has the same bits alone,
// among others, and after the ring has turned.
class Attend {
 public:
  // `parts` are job.scratch_floats() floats of working memory; both must outlive this.
  Attend(const CachedAttention& job, float* parts);

  // First all scores, in any order, then all merges.
  int64_t scores() const {
    return pairs_ * blocks_;
  }
  int64_t merges() const {
    return pairs_ * rows_;
  }
  // `next` is the task that the same thread does after this one, or -1: its keys are read ahead.
  void score(int64_t task, int64_t next = -1) const;
  void merge(int64_t task) const;

  // The memory that a task reads first: keys, or with `values` the values that belong to them.
  Ahead first_read(int64_t task, bool values = false) const;

  // About how many additions and multiplications one of them takes.
  double score_cost() const;
  double merge_cost() const;

 private:
  struct Span;
  Span span_of(int64_t b, int block) const;
  int slot(const Span& span, int j) const;
  const void* row_of(const void* cache, int64_t pair, int slot) const;
  int64_t row_bytes() const;
  bool gather_masks(int64_t pair, const Span& span, void* masks, char* to) const;

  const CachedAttention& job_;
  float* parts_;
  int group_, rows_, blocks_;
  int64_t pairs_, part_floats_;
};

} // namespace edger1
