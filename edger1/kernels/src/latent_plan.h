// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) as plain pointers and numbers; knows nothing of MLX's graph.
//
// What is cached of a position is one latent c of `rank` elements and one rotated key of `rope` elements, for all heads.
// Head h has keys K_h c and values V_h c. Over few rows those matrices go to the other side ("absorbed"):
//
//   score(q, j) = (K_h^T q_nope) . c_j + q_pe . k_pe_j        out = V_h sum_j softmax(score)_j c_j
//
// so that a row of a head meets the latents as they lie in the cache. Everything is float32 but the weights and the cache.
#pragma once

#include <cstdint>
#include <vector>

#include "decoder_plan.h"
#include "latent_math.h"
#include "packed_rows.h"

namespace edger1 {

struct LatentNorm {
  const float* weight = nullptr;
  float eps = 0;
};

struct LatentPlan {
  bool fast = false;                   // int8 rows in products with quantized weights
  bool bf16 = false;                   // attention itself in bf16, where the processor has products of it
  int heads = 0, nope = 0, rope = 0, rank = 0, value = 0;
  float scale = 1;                     // of scores
  std::vector<Projection> embed;       // of each head [rank, nope]: K_h^T
  bool embed_by_rows = false;          // or [nope, rank]: K_h, the rows that lie in one matrix with those of V_h
  std::vector<Projection> unembed;     // of each head [value, rank]: V_h

  // The projections around it, where `whole`: q = q_b(norm(q_a(x))) or q(x); c, k_pe = kv_a(x); y = o(out).
  bool whole = false;
  int hidden = 0;
  Projection q_a, q, kv_a, o;
  LatentNorm q_norm, kv_norm;
  int rope_dims = 0;                   // 0: nothing is rotated
  bool rope_interleaved = false;
  float rope_scale = 1, rope_multiplier = 1;
  std::vector<float> inverse_freqs;
};

// Rows of any strides, in elements: [batch, head, row, element].
struct LatentRows {
  const void* data = nullptr;
  Float type = Float::f32;
  int64_t batch = 0, head = 0, row = 0, step = 1;
  RowFormat format{};                    // where rows are packed; strides then are in words of 32 bits

  const void* at(int64_t b, int64_t h, int64_t r) const {
    return offset(data, type, b * batch + h * head + r * row);
  }
  // `n` elements of a row as contiguous floats.
  void fetch(int64_t b, int64_t h, int64_t r, int n, float* to) const;

  // Rows r .. r + n - 1 of the only head, of `dim` elements: where they lie or, packed ones, as floats in `scratch`.
  LatentRows block(int64_t b, int64_t r, int n, int dim, float* scratch) const {
    if (!format.packed()) {
      return {at(b, 0, r), type, 0, 0, row, step, {}};
    }
    unpack_rows(scratch, at(b, 0, r), row, n, dim, format);
    return {scratch, Float::f32, 0, 0, dim, 1, {}};
  }
};

// The keys that a row sees: first .. last, all of them where `solid`, else those that the mask keeps. A row that sees
// nothing weighs all keys alike, as MLX has it.
struct KeySpan {
  int first = 0, last = -1;
  bool solid = true, blank = false;
};

struct LatentCall {
  int batch = 1, length = 1, keys = 0;
  LatentRows q_nope, q_pe;             // [B, H, L, nope] and [B, H, L, rope]
  LatentRows latent, k_pe;             // [B, 1, S, rank] and [B, 1, S, rope]
  bool causal = false;                 // row l sees keys up to keys - length + l
  const bool* keep = nullptr;          // or a mask [B, L, S]
  int64_t mask_strides[3] = {};
  float* out = nullptr;                // [B, L, H * value]
};

// One element for each [B, L].
std::vector<KeySpan> key_spans(const LatentCall& call);

// Turns the scores of a row with keys [key, key + n) into weights, of the online softmax with the given maximum and
// sum; returns the factor for what was added up before. The span is that of row l of batch b.
float weigh_keys(const LatentCall& call, const KeySpan& span, int b, int l, int key, int n, float* scores, float* maximum,
                 float* sum);

// `out` rows (of `p.n` elements, at any places) = rows of x [m, p.k], contiguous, by the calling thread. A row's result does not
// depend on how many there are; m <= kMaxRows.
void project_rows(const Projection& p, bool fast, const float* x, int m, float* const* out);

// The same with the weights [n, k] not transposed: `out` rows of `p.k` elements = rows of x [m, p.n], in float32 whatever
// the precision.
void project_back(const Projection& p, const float* x, int m, float* const* out);

// A projection's weights [n, k] as floats; and of one row `count` from `first` on, both whole groups of a quantized one.
void widen(const Projection& p, float* out);
void widen_row(const Projection& p, int row, int first, int count, float* out);

// Queries of up to kMaxRows positions: absorbed; a row's result does not depend on the others.
void run_latent_few(const LatentPlan& plan, const LatentCall& call);

// More: tiles of rows of some heads over blocks of keys. What it needs beside its operands is constant.
void run_latent_many(const LatentPlan& plan, const LatentCall& call);

inline void run_latent(const LatentPlan& plan, const LatentCall& call) {
  if (call.length <= kMaxRows) {
    run_latent_few(plan, call);
  } else {
    run_latent_many(plan, call);
  }
}

// A whole attention half: x [batch * length, hidden] with rows x_stride apart, result likewise; latents and rotated keys
// are written into the cache [batch, capacity, rank] and [batch, capacity, rope] at offset .. offset + length - 1.
struct LatentLayerCall {
  int batch = 1, length = 1;
  const float* x = nullptr;
  int64_t x_stride = 0;
  float* out = nullptr;
  float *latent = nullptr, *k_pe = nullptr;
  int capacity = 0, offset = 0;
  bool causal = true;
  const bool* keep = nullptr;
  int64_t mask_strides[3] = {};
};

void run_latent_layer(const LatentPlan& plan, const LatentLayerCall& call);

} // namespace edger1
