#include "attention_driver.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "dense_driver.h"
#include "pool.h"

namespace edger1 {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int kBlockKeys = 256;   // fixed, so that a row's result does not depend on how work is split

// Floats of scratch that a block of keys and values from a source takes.
int64_t source_floats(const AttentionJob& job) {
  return job.source ? int64_t{kBlockKeys} * (job.dim + job.value_dim) : 0;
}

// Keys and values [key, key + n): where they lie, or fetched into `scratch` (source_floats).
KeyBlock key_block(const AttentionJob& job, int64_t b, int64_t kv, int key, int n, float* scratch) {
  if (!job.source) {
    return {job.k.at(b, kv, key), job.v.at(b, kv, key), job.k.type, job.k.row, job.v.row, n, job.dim, job.value_dim};
  }
  float* values = scratch + int64_t{kBlockKeys} * job.dim;
  job.source->fetch(b, kv, key, n, scratch, values);
  return {scratch, values, Float::f32, job.dim, job.value_dim, n, job.dim, job.value_dim};
}

// How many keys query row l sees.
int visible_keys(const AttentionJob& job, int l) {
  return job.causal ? std::clamp(job.keys - job.length + l + 1, 0, job.keys) : job.keys;
}

MaskRows mask_row(const AttentionJob& job, int b, int h, int l, int key) {
  const int64_t* s = job.mask_strides;
  int64_t at = b * s[0] + h * s[1] + l * s[2] + key * s[3];
  return {job.keep ? job.keep + at : nullptr, job.add ? job.add + at : nullptr, s[2], s[3]};
}

void write_row(const AttentionJob& job, int b, int h, int l, const float* row) {
  int64_t at = ((int64_t{b} * job.length + l) * job.heads + h) * job.value_dim;
  ops().from_f32(offset(job.out, job.out_type, at), job.out_type, row, job.value_dim);
}

// Ends a row: the sink joins the sum, the weighted values are divided by it.
void finish_row(const AttentionJob& job, int h, float top, float sum, float* row) {
  if (job.sinks) {
    float sink = job.sinks[h], best = std::max(top, sink);
    float factor = top == kMinusInfinity ? 0.0f : std::exp(top - best);
    sum = sum * factor + std::exp(sink - best);
    ops().scale_row(row, factor / sum, job.value_dim);
  } else {
    ops().scale_row(row, 1.0f / sum, job.value_dim);
  }
}

// Few queries: for each key head and block of keys, all queries of all its heads at once; partial results are then merged in
// the order of the blocks.
void few_queries(const AttentionJob& job) {
  int group = job.heads / job.kv_heads, rows = group * job.length;
  int blocks = (job.keys + kBlockKeys - 1) / kBlockKeys;
  int64_t pairs = int64_t{job.batch} * job.kv_heads;
  int64_t query_floats = pairs * rows * job.dim, part_floats = int64_t{rows} * (job.value_dim + 2);
  auto* queries = static_cast<float*>(
      thread_scratch(1, sizeof(float) * static_cast<size_t>(query_floats + pairs * blocks * part_floats)));
  float* parts = queries + query_floats;
  for (int64_t pair = 0; pair < pairs; pair++) {
    int64_t b = pair / job.kv_heads, kv = pair % job.kv_heads;
    for (int r = 0; r < rows; r++) {
      float* to = queries + (pair * rows + r) * job.dim;
      ops().to_f32(to, job.q.at(b, kv * group + r / job.length, r % job.length), job.q.type, job.dim);
      ops().scale_row(to, job.scale, job.dim);
    }
  }
  // Head dimensions times keys times rows, in units of about a tenth of a nanosecond.
  double cost = static_cast<double>(rows) * std::min(job.keys, kBlockKeys) * (job.dim + job.value_dim) / 8;
  int64_t tasks = pairs * blocks;
  parallel_ranges(tasks, grain_for(tasks, cost, 20000), [&](int64_t begin, int64_t end) {
    size_t row_bytes = sizeof(float) * (kBlockKeys + 16) + sizeof(int) + sizeof(MaskRows);
    auto* fetched = static_cast<float*>(
        thread_scratch(0, sizeof(float) * static_cast<size_t>(source_floats(job)) + static_cast<size_t>(rows) * row_bytes));
    float* scores = fetched + source_floats(job);
    auto* masks = reinterpret_cast<MaskRows*>(scores + int64_t{rows} * (kBlockKeys + 16));
    auto* visible = reinterpret_cast<int*>(masks + rows);
    for (int64_t task = begin; task < end; task++) {
      int64_t pair = task / blocks, b = pair / job.kv_heads, kv = pair % job.kv_heads;
      int key = static_cast<int>(task % blocks) * kBlockKeys, n = std::min(kBlockKeys, job.keys - key);
      for (int r = 0; r < rows; r++) {
        int l = r % job.length;
        visible[r] = std::clamp(visible_keys(job, l) - key, 0, n);
        masks[r] = mask_row(job, static_cast<int>(b), static_cast<int>(kv) * group + r / job.length, l, key);
      }
      KeyBlock block = key_block(job, b, kv, key, n, fetched);
      if (!job.source && key + n < job.keys && job.k.row == job.dim) {
        block.next = job.k.at(b, kv, key + n);
        block.next_bytes = std::min(kBlockKeys, job.keys - key - n) * job.dim * bytes_of(job.k.type);
      }
      float* part = parts + task * part_floats;
      ops().attention_rows(part, part + rows, part + 2 * rows, queries + pair * rows * job.dim, rows, block, visible,
                           job.keep || job.add ? masks : nullptr, scores);
    }
  });
  std::vector<float> row(static_cast<size_t>(job.value_dim));
  for (int64_t pair = 0; pair < pairs; pair++) {
    for (int r = 0; r < rows; r++) {
      float top = kMinusInfinity, sum = 0;
      std::fill(row.begin(), row.end(), 0.0f);
      for (int i = 0; i < blocks; i++) {
        const float* part = parts + (pair * blocks + i) * part_floats;
        float part_top = part[r], part_sum = part[rows + r];
        if (part_top == kMinusInfinity) {
          continue;
        }
        float best = std::max(top, part_top);
        float before = top == kMinusInfinity ? 0.0f : std::exp(top - best), after = std::exp(part_top - best);
        ops().blend_row(row.data(), before, part + 2 * rows + int64_t{r} * job.value_dim, after, job.value_dim);
        sum = sum * before + part_sum * after;
        top = best;
      }
      int h = static_cast<int>(pair % job.kv_heads) * group + r / job.length;
      finish_row(job, h, top, sum, row.data());
      write_row(job, static_cast<int>(pair / job.kv_heads), h, r % job.length, row.data());
    }
  }
}

// Whether some row of the tile sees some key of the block through a boolean mask.
bool any_kept(const AttentionJob& job, int b, int h, int first_row, int rows, int key, int n) {
  for (int l = first_row; l < first_row + rows; l++) {
    MaskRows mask = mask_row(job, b, h, l, key);
    for (int j = 0; j < n; j++) {
      if (mask.keep[j * mask.key_stride]) {
        return true;
      }
    }
  }
  return false;
}

// Many queries: tiles of rows of all the heads that share a key head, over blocks of keys with an online softmax. Nothing
// the size of length times keys is ever in memory.
void many_queries(const AttentionJob& job) {
  int group = job.heads / job.kv_heads;
  int tile = std::min(job.length, std::max(16, 192 / group));
  int tiles = (job.length + tile - 1) / tile;
  int block = kBlockKeys, nr = ops().nr;
  auto pad = [&](int64_t n) { return (n + nr - 1) / nr * nr; };
  parallel_for(int64_t{job.batch} * job.kv_heads * tiles, [&](int64_t task) {
    // The last tiles see the most keys: they go first.
    int t = tiles - 1 - static_cast<int>(task % tiles), kv = static_cast<int>(task / tiles % job.kv_heads);
    int b = static_cast<int>(task / tiles / job.kv_heads);
    int first = t * tile, length = std::min(tile, job.length - first), rows = group * length;
    int64_t dim = job.dim, value_dim = job.value_dim;
    int64_t sizes[] = {rows * dim,       pad(block) * dim, int64_t{rows} * block, int64_t{rows} * block,
                       pad(value_dim) * block, rows * value_dim, rows,                  rows,
                       source_floats(job)};
    int64_t total = 0;
    for (int64_t& size : sizes) {
      size = (size + 15) / 16 * 16;
      total += size;
    }
    auto* at = static_cast<float*>(thread_scratch(0, sizeof(float) * static_cast<size_t>(total)));
    float* areas[9];
    for (int i = 0; i < 9; i++) {
      areas[i] = at;
      at += sizes[i];
    }
    auto [q, k, scores, p, v, out, top, sum, fetched] = areas;
    // Row r is query first + r % length of head r / length.
    std::vector<float> plain(static_cast<size_t>(rows * dim));
    for (int r = 0; r < rows; r++) {
      float* row = plain.data() + r * dim;
      ops().to_f32(row, job.q.at(b, kv * group + r / length, first + r % length), job.q.type, dim);
      ops().scale_row(row, job.scale, static_cast<int>(dim));
    }
    ops().pack_a(q, plain.data(), Float::f32, dim, 1, rows, static_cast<int>(dim));
    std::fill(top, top + rows, kMinusInfinity);
    std::fill(sum, sum + rows, 0.0f);
    std::fill(out, out + rows * value_dim, 0.0f);
    int limit = visible_keys(job, first + length - 1);
    for (int key = 0; key < limit; key += block) {
      int n = std::min(block, limit - key);
      // Blocks outside a sliding window; only where the rows have seen something, since MLX's answer to a row that sees
      // nothing is the mean of all values.
      if (job.keep) {
        bool skip = *std::min_element(sum, sum + rows) > 0;
        for (int g = 0; skip && g < (job.mask_strides[1] == 0 ? 1 : group); g++) {
          skip = !any_kept(job, b, kv * group + g, first, length, key, n);
        }
        skip = skip && *std::min_element(top, top + rows) > -std::numeric_limits<float>::max();
        if (skip) {
          continue;
        }
      }
      KeyBlock found = key_block(job, b, kv, key, n, fetched);
      ops().pack_b(k, found.keys, found.type, 1, found.key_stride, job.dim, n);
      ops().gemm(scores, block, q, k, rows, n, job.dim, false);
      for (int r = 0; r < rows; r++) {
        float* row = scores + int64_t{r} * block;
        int l = first + r % length, seen = std::clamp(visible_keys(job, l) - key, 0, n);
        MaskRows mask = mask_row(job, b, kv * group + r / length, l, key);
        if (mask.keep) {
          for (int j = 0; j < seen; j++) {
            row[j] = mask.keep[j * mask.key_stride] ? row[j] : -std::numeric_limits<float>::max();
          }
        } else if (mask.add) {
          for (int j = 0; j < seen; j++) {
            row[j] += mask.add[j * mask.key_stride];
          }
        }
        float factor = 1;
        if (seen > 0) {
          factor = ops().online_softmax(row, seen, top + r, sum + r);
        }
        std::fill(row + seen, row + n, 0.0f);
        if (factor != 1) {
          ops().scale_row(out + r * value_dim, factor, job.value_dim);
        }
      }
      ops().pack_a(p, scores, Float::f32, block, 1, rows, n);
      ops().pack_b(v, found.values, found.type, found.value_stride, 1, n, job.value_dim);
      ops().gemm(out, value_dim, p, v, rows, job.value_dim, n, true);
    }
    for (int r = 0; r < rows; r++) {
      int h = kv * group + r / length;
      finish_row(job, h, top[r], sum[r], out + r * value_dim);
      write_row(job, b, h, first + r % length, out + r * value_dim);
    }
  });
}

} // namespace

void run_attention(const AttentionJob& job) {
  if (job.length <= kInvariantRows) {
    few_queries(job);
  } else {
    many_queries(job);
  }
}

} // namespace edger1
