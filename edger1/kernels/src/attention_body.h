// Attention of a few query rows over a block of keys, for one instruction set; see ops_table.h.
#pragma once

#include "gemm_body.h"
#include "rows_body.h"

namespace edger1 {
namespace {

// Sums of the lanes of kWidth vectors, as one vector: lane i is the sum of v[i], added in the same tree for every i.
template <int N>
EDGER1_INLINE vf lane_sums(vf* v) {
  vi even, odd;
  constexpr int step = kWidth / N;
  // Blocks of `step` lanes: of each pair of blocks the first goes to `even`, the second to `odd`, from either operand.
  for (int i = 0; i < kWidth; i++) {
    int block = i / step, inside = i % step;
    int operand = (block & 1) * kWidth;
    even[i] = operand + (block & ~1) * step + inside;
    odd[i] = even[i] + step;
  }
  for (int i = 0; i < N / 2; i++) {
    v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
  }
  if constexpr (N == 2) {
    return v[0];
  } else {
    return lane_sums<N / 2>(v);
  }
}

// scores[0, kWidth) = the dot products of a query with kWidth keys.
template <class T>
EDGER1_INLINE vf key_scores(const float* query, const T* const* keys, int dim) {
  vf acc[kWidth];
#pragma GCC unroll 16
  for (int j = 0; j < kWidth; j++) {
    acc[j] = vf{};
  }
  int d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    vf q = load(query + d);
#pragma GCC unroll 16
    for (int j = 0; j < kWidth; j++) {
      acc[j] = mad(q, load(keys[j] + d), acc[j]);
    }
  }
  if (d < dim) {
    vf q = load_n(query + d, dim - d);
    for (int j = 0; j < kWidth; j++) {
      acc[j] = mad(q, load_n(keys[j] + d, dim - d), acc[j]);
    }
  }
  return lane_sums<kWidth>(acc);
}

// Calls body(j, row) for keys [lead, n) of a block, `values` being where the first one's row begins.
template <class T, class Body>
EDGER1_INLINE void each_key(const KeyBlock& block, const T* values, int n, Body&& body) {
  const T* row = values;
  int turn = block.turn < n ? block.turn : n;
  for (int j = block.lead; j < turn; j++, row += block.value_stride) {
    body(j, row);
  }
  if (turn < n) {
    row += block.jump * block.value_stride;
    for (int j = turn; j < n; j++, row += block.value_stride) {
      body(j, row);
    }
  }
}

template <int ROWS, int VECTORS, class T>
EDGER1_INLINE void weighted_values(float* out, int64_t out_stride, const float* p, int64_t p_stride, int n,
                                   const T* values, const KeyBlock& block) {
  vf acc[ROWS][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      acc[r][v] = vf{};
    }
  }
  each_key(block, values, n, [&](int j, const T* row) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      vf y = load(row + v * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        acc[r][v] = mad(splat(p[r * p_stride + j]), y, acc[r][v]);
      }
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      store(out + r * out_stride + v * kWidth, acc[r][v]);
    }
  }
}

constexpr int kKeysAhead = 3 * kWidth;

template <class T>
EDGER1_INLINE void ask_for(const T* row, int n) {
  for (int64_t at = 0; at < n; at += 64 / static_cast<int>(sizeof(T))) {
    __builtin_prefetch(row + at);
  }
}

// Elements of a key beyond which it is not worth widening on the stack.
constexpr int kWidenedDim = 256;

template <class T>
EDGER1_INLINE void widen(float* to, const T* from, int n) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    store(to + i, load(from + i));
  }
  if (i < n) {
    store_n(to + i, load_n(from + i, n - i), n - i);
  }
}

template <class T>
static void attention_rows_of(float* maxima, float* sums, float* accumulated, const float* queries, int rows,
                              const KeyBlock& block, const T* keys, const T* values, const int* visible,
                              const MaskRows* masks, float* scores) {
  int64_t stride = block.n_keys + kWidth;
  int most = 0;
  for (int r = 0; r < rows; r++) {
    most = visible[r] > most ? visible[r] : most;
  }
  int lead = block.lead;
  for (int j = lead / kWidth * kWidth; j < most; j += kWidth) {
    const T* at[kWidth];
    for (int i = 0; i < kWidth; i++) {
      int key = j + i < lead ? lead : j + i < most ? j + i : most - 1;
      int64_t row = key - lead + (key < block.turn ? 0 : block.jump);
      at[i] = keys + row * block.key_stride;
      // Keys for a later turn of this loop, and values for what follows it: memory is far, and all rows at once use little of it.
      ask_for(at[i] + kKeysAhead * block.key_stride, block.head_dim);
      ask_for(values + row * block.value_stride, block.value_dim);
    }
    // Narrow keys that several rows meet are widened once.
    if (sizeof(T) == 4 || rows == 1 || block.head_dim > kWidenedDim) {
      for (int r = 0; r < rows; r++) {
        store(scores + r * stride + j, key_scores(queries + static_cast<int64_t>(r) * block.head_dim, at, block.head_dim));
      }
    } else {
      alignas(64) float wide[kWidth * kWidenedDim];
      const float* from[kWidth];
      for (int i = 0; i < kWidth; i++) {
        from[i] = wide + i * kWidenedDim;
        widen(wide + i * kWidenedDim, at[i], block.head_dim);
      }
      for (int r = 0; r < rows; r++) {
        store(scores + r * stride + j,
              key_scores(queries + static_cast<int64_t>(r) * block.head_dim, from, block.head_dim));
      }
    }
  }
  for (int r = 0; r < rows; r++) {
    float* row = scores + r * stride;
    int n = visible[r];
    if (block.soft_cap != 0) {
      vf cap = splat(block.soft_cap), inverse = splat(1.0f / block.soft_cap);
      for (int j = lead / kWidth * kWidth; j < n; j += kWidth) {
        store(row + j, cap * vtanh(load(row + j) * inverse));
      }
    }
    if (masks && masks[r].keep) {
      for (int j = 0; j < n; j++) {
        row[j] = masks[r].keep[j * masks[r].key_stride] ? row[j] : -3.4028234663852886e38f;
      }
    } else if (masks && masks[r].add) {
      for (int j = 0; j < n; j++) {
        row[j] += masks[r].add[j * masks[r].key_stride];
      }
    }
    // A lane of the sum is a place in the block, whatever the block begins with.
    for (int j = 0; j < lead; j++) {
      row[j] = -__builtin_inff();
    }
    float top = -__builtin_inff(), sum = 0;
    if (n > lead) {
      online_softmax(row, n, &top, &sum);
    }
    // Keys that other rows of this call see but this one does not: weight 0 leaves its sums as they are.
    for (int j = n > lead ? n : lead; j < most; j++) {
      row[j] = 0;
    }
    maxima[r] = top;
    sums[r] = sum;
  }
  int dim = block.value_dim;
  for (int d = 0; d < dim;) {
    float* out = accumulated + d;
    const T* from = values + d;
    if (d + 4 * kWidth <= dim) {
      int r = 0;
      for (; r + 4 <= rows; r += 4) {
        weighted_values<4, 4>(out + r * dim, dim, scores + r * stride, stride, most, from, block);
      }
      if (rows - r == 3) {
        weighted_values<3, 4>(out + r * dim, dim, scores + r * stride, stride, most, from, block);
      } else if (rows - r == 2) {
        weighted_values<2, 4>(out + r * dim, dim, scores + r * stride, stride, most, from, block);
      } else if (rows - r == 1) {
        weighted_values<1, 4>(out + r * dim, dim, scores + r * stride, stride, most, from, block);
      }
      d += 4 * kWidth;
    } else if (d + kWidth <= dim) {
      for (int r = 0; r < rows; r++) {
        weighted_values<1, 1>(out + r * dim, dim, scores + r * stride, stride, most, from, block);
      }
      d += kWidth;
    } else {
      int left = dim - d;
      for (int r = 0; r < rows; r++) {
        vf acc{};
        each_key(block, from, most, [&](int j, const T* row) {
          acc = mad(splat(scores[r * stride + j]), load_n(row, left), acc);
        });
        store_n(out + r * dim, acc, left);
      }
      d = dim;
    }
  }
}

static void attention_rows(float* maxima, float* sums, float* accumulated, const float* queries, int rows,
                           const KeyBlock& block, const int* visible, const MaskRows* masks, float* scores) {
  typed(block.keys, block.type, [&](auto* keys) {
    attention_rows_of(maxima, sums, accumulated, queries, rows, block, keys,
                      static_cast<decltype(keys)>(block.values), visible, masks, scores);
  });
}

} // namespace

// The table of the including source.
#define EDGER1_OPS_TABLE(NAME)                                                                                         \
  {                                                                                                                    \
    NAME, to_f32, from_f32, kMR, kNR, pack_a, pack_b, gemm, dot_rows, axpy_rows, rms_norm, rms_norm_vjp, layer_norm,   \
        softmax, softmax_vjp, log_sum_exp, argmax, rope, unary, unary_vjp, gate, gate_vjp, attention_rows,             \
        online_softmax, scale_row, blend_row                                                                           \
  }

} // namespace edger1
