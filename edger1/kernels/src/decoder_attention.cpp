#include "decoder_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops_table.h"
#include "pool.h"

namespace edger1 {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int kMergedAtOnce = 64;
constexpr int kBlockKeys = 256;   // as in attention alone, so that both give the same bits

int first_block(const CachedAttention& job) {
  return job.order.first_position / kBlockKeys;
}

int block_count(const CachedAttention& job) {
  return (job.end - 1) / kBlockKeys - first_block(job) + 1;
}

size_t padded_to_16(size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

} // namespace

// One block of positions of a sequence: [at + lead, at + n), n <= 0 if it has none there, out of all before `end`, those of
// position 0 being in slot `first_slot` at the least.
struct Attend::Span {
  int at, lead, n, end, first_slot;
};

Attend::Attend(const CachedAttention& job, float* parts)
    : job_(job), parts_(parts), group_(job.heads / job.kv_heads), rows_(group_ * job.length), blocks_(block_count(job)),
      pairs_(int64_t{job.batch} * job.kv_heads), part_floats_(int64_t{rows_} * (job.dim + 2)) {}

double Attend::score_cost() const {
  return 2.0 * rows_ * std::min(job_.end - job_.order.first_position, kBlockKeys) * job_.dim;
}

double Attend::merge_cost() const {
  return 2.0 * blocks_ * job_.dim;
}

Attend::Span Attend::span_of(int64_t b, int block) const {
  int at = (first_block(job_) + block) * kBlockKeys, first_slot = job_.first_slots ? job_.first_slots[b] : 0;
  int end = job_.end - first_slot;
  return {at, std::max(job_.order.first_position - at, 0), std::min(kBlockKeys, end - at), end, first_slot};
}

// All queries of all the heads that share a key head, over one block.
void Attend::score(int64_t task, int64_t next) const {
  int64_t pair = task / blocks_, dim = job_.dim;
  Span span = span_of(pair / job_.kv_heads, static_cast<int>(task % blocks_));
  float* to = parts_ + task * part_floats_;
  if (span.n <= 0) {
    std::fill(to, to + rows_, kMinusInfinity);
    return;
  }
  size_t rows = static_cast<size_t>(rows_);
  bool masked = job_.mask.keep || job_.mask.add;
  size_t mask_bytes = masked ? rows * (sizeof(MaskRows) + kBlockKeys * (job_.mask.keep ? 1 : 4)) : 0;
  size_t unpacked = job_.format.packed() ? size_t{2} * kBlockKeys * static_cast<size_t>(dim) : 0;
  auto* masks = static_cast<MaskRows*>(thread_scratch(
      0, padded_to_16(mask_bytes) + unpacked * sizeof(float) + rows * ((kBlockKeys + 16) * sizeof(float) + sizeof(int))));
  auto* numbers = reinterpret_cast<float*>(reinterpret_cast<char*>(masks) + padded_to_16(mask_bytes));
  float* scores = numbers + unpacked;
  auto* visible = reinterpret_cast<int*>(scores + rows * (kBlockKeys + 16));
  bool any = !masked;
  if (masked) {
    any = gather_masks(pair, span, masks, reinterpret_cast<char*>(masks + rows));
  }
  for (int r = 0; r < rows_; r++) {
    int seen = span.end - job_.length + r % job_.length + 1 - span.at;
    visible[r] = masked ? span.n : std::clamp(seen, 0, span.n);
  }
  if (!any) {
    std::fill(to, to + rows_, kMinusInfinity);
    return;
  }
  int begin = slot(span, span.lead);
  KeyBlock block{row_of(job_.keys, pair, begin), row_of(job_.values, pair, begin), job_.type, dim, dim, span.n,
                 job_.dim, job_.dim};
  block.lead = span.lead;
  block.turn = span.lead + job_.order.capacity - begin;
  block.jump = -int64_t{job_.order.capacity};
  if (unpacked) {
    int there = span.n - span.lead, straight = std::min(there, job_.order.capacity - begin);
    float* to = numbers;
    for (const void* cache : {job_.keys, job_.values}) {
      int64_t words = row_bytes() / 4;
      unpack_rows(to, row_of(cache, pair, begin), words, straight, job_.dim, job_.format);
      unpack_rows(to + straight * dim, row_of(cache, pair, 0), words, there - straight, job_.dim, job_.format);
      to += kBlockKeys * dim;
    }
    block.keys = numbers;
    block.values = numbers + kBlockKeys * dim;
    block.type = Float::f32;
    block.turn = kBlockKeys;
  }
  block.soft_cap = job_.soft_cap;
  if (next >= 0) {
    Ahead then = first_read(next);
    block.next = then.begin;
    block.next_bytes = then.bytes;
  }
  ops().attention_rows(to, to + rows_, to + 2 * rows_, job_.queries + pair * rows_ * dim, rows_, block, visible,
                       masked ? masks : nullptr, scores);
}

Ahead Attend::first_read(int64_t task, bool values) const {
  int64_t pair = task / blocks_;
  Span span = span_of(pair / job_.kv_heads, static_cast<int>(task % blocks_));
  if (span.n <= span.lead) {
    return {};
  }
  int begin = slot(span, span.lead), rows = std::min(span.n - span.lead, job_.order.capacity - begin);
  return {row_of(values ? job_.values : job_.keys, pair, begin), 0, rows * row_bytes()};
}

int64_t Attend::row_bytes() const {
  return job_.format.packed() ? job_.format.words(job_.dim) * 4 : job_.dim * bytes_of(job_.type);
}

// A row of a key head of a sequence.
const void* Attend::row_of(const void* cache, int64_t pair, int slot) const {
  return static_cast<const char*>(cache) + (pair * job_.order.capacity + slot) * row_bytes();
}

// Where key j of a block is.
int Attend::slot(const Span& span, int j) const {
  return span.first_slot + job_.order.slot(span.at + j);
}

// Masks of the block's positions in their order; false if nobody sees any of them.
bool Attend::gather_masks(int64_t pair, const Span& span, void* rows, char* to) const {
  auto* masks = static_cast<MaskRows*>(rows);
  const int64_t* strides = job_.mask.strides;
  int64_t b = pair / job_.kv_heads, head = pair % job_.kv_heads * group_;
  bool any = job_.mask.add != nullptr;
  for (int r = 0; r < rows_; r++) {
    int64_t row = b * strides[0] + (head + r / job_.length) * strides[1] + r % job_.length * strides[2];
    masks[r] = {};
    masks[r].key_stride = 1;
    if (strides[1] == 0 && r >= job_.length) {
      masks[r] = masks[r - job_.length];
    } else if (job_.mask.keep) {
      auto* keep = reinterpret_cast<bool*>(to) + int64_t{r} * kBlockKeys;
      std::fill(keep, keep + span.lead, false);
      for (int j = span.lead; j < span.n; j++) {
        keep[j] = job_.mask.keep[row + slot(span, j) * strides[3]];
        any = any || keep[j];
      }
      masks[r].keep = keep;
    } else {
      auto* add = reinterpret_cast<float*>(to) + int64_t{r} * kBlockKeys;
      for (int j = 0; j < span.n; j++) {
        add[j] = j < span.lead ? 0 : job_.mask.add[row + slot(span, j) * strides[3]];
      }
      masks[r].add = add;
    }
  }
  return any;
}

void Attend::merge(int64_t task) const {
  int64_t pair = task / rows_;
  int r = static_cast<int>(task % rows_);
  int dim = job_.dim;
  int64_t b = pair / job_.kv_heads, head = pair % job_.kv_heads * group_ + r / job_.length, l = r % job_.length;
  float* to = job_.out + ((b * job_.length + l) * job_.heads + head) * dim;
  std::fill(to, to + dim, 0.0f);
  float top = kMinusInfinity, sum = 0;
  for (int i = 0; i < blocks_;) {
    const float* parts = parts_ + (pair * blocks_ + i) * part_floats_;
    float before[kMergedAtOnce], after[kMergedAtOnce];
    int count = 0;
    // A block of which nothing is visible holds no numbers.
    for (const float* part = parts; i + count < blocks_ && count < kMergedAtOnce && part[r] != kMinusInfinity; count++) {
      // Of the two factors one is e^0.
      before[count] = top == kMinusInfinity ? 0.0f : part[r] > top ? std::exp(top - part[r]) : 1.0f;
      after[count] = part[r] < top ? std::exp(part[r] - top) : 1.0f;
      sum = sum * before[count] + part[rows_ + r] * after[count];
      top = std::max(top, part[r]);
      part += part_floats_;
    }
    if (count == 0) {
      i++;
      continue;
    }
    ops().blend_rows(to, before, parts + 2 * rows_ + int64_t{r} * dim, part_floats_, after, count, dim);
    i += count;
  }
  float factor = 1;
  if (job_.sinks) {
    float sink = job_.sinks[head], best = std::max(top, sink);
    factor = top == kMinusInfinity ? 0.0f : std::exp(top - best);
    sum = sum * factor + std::exp(sink - best);
  }
  // A row that sees nothing is padding: what it gives is nobody's, but must be a number.
  ops().scale_row(to, sum > 0 ? factor / sum : 0.0f, dim);
}

int64_t CachedAttention::scratch_floats() const {
  return int64_t{batch} * heads * length * block_count(*this) * (dim + 2);
}

} // namespace edger1
