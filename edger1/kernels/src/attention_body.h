// Attention of a few query rows over a block of keys, for one instruction set; see ops_table.h.
#pragma once

#include "gemm_body.h"
#include "rows_body.h"

namespace edger1 {
namespace {

// One level of lane_sums: blocks of kWidth / N lanes of two vectors, of each pair of blocks the sum, those of `a` first.
template <int N>
EDGER1_INLINE vf lane_sums_of(vf a, vf b) {
  vi even, odd;
  constexpr int step = kWidth / N;
  for (int i = 0; i < kWidth; i++) {
    int block = i / step, inside = i % step;
    int operand = (block & 1) * kWidth;
    even[i] = operand + (block & ~1) * step + inside;
    odd[i] = even[i] + step;
  }
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// Sums of the lanes of kWidth vectors, of which v holds N after the first levels: lane i is the sum of the i-th, added in
// the same tree for every i.
template <int N>
EDGER1_INLINE vf lane_sums(vf* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    for (int i = 0; i < N / 2; i++) {
      v[i] = lane_sums_of<N>(v[2 * i], v[2 * i + 1]);
    }
    return lane_sums<N / 2>(v);
  }
}

// Query rows whose scores are computed at once, as many as leave registers for the keys.
constexpr int kScoreRows = kWidth == 8 ? 2 : 4;

// For ROWS queries: scores[r * stride + (0 .. kWidth)) = the dot products of query r with kWidth keys. Four keys at a time
// meet all rows while they are in registers.
template <int ROWS, class T>
EDGER1_INLINE void key_scores(float* scores, int64_t stride, const float* queries, const T* const* keys, int dim) {
  vf quarter[ROWS][kWidth / 4];
#pragma GCC unroll 4
  for (int j = 0; j < kWidth; j += 4) {
    vf acc[ROWS][4];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        acc[r][i] = vf{};
      }
    }
    auto step = [&](auto from) __attribute__((always_inline)) {
      vf key[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        key[i] = from(keys[j + i]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        vf query = from(queries + int64_t{r} * dim);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          acc[r][i] = mad(query, key[i], acc[r][i]);
        }
      }
    };
    int d = 0;
    for (; d + kWidth <= dim; d += kWidth) {
      step([&](auto* row) __attribute__((always_inline)) { return load(row + d); });
    }
    if (d < dim) {
      step([&](auto* row) __attribute__((always_inline)) { return load_n(row + d, dim - d); });
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      vf half[2] = {lane_sums_of<kWidth>(acc[r][0], acc[r][1]), lane_sums_of<kWidth>(acc[r][2], acc[r][3])};
      quarter[r][j / 4] = lane_sums_of<kWidth / 2>(half[0], half[1]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    store(scores + r * stride, lane_sums<kWidth / 4>(quarter[r]));
  }
}

// Asks for one row to the first-level cache (3) or the second (2).
template <int LEVEL, class T>
EDGER1_INLINE void ask_for(const T* row, int n) {
  for (int64_t at = 0; at < n; at += 64 / static_cast<int>(sizeof(T))) {
    __builtin_prefetch(row + at, 0, LEVEL);
  }
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

// Memory that is asked for little by little, to the second-level cache.
struct Asked {
  const char* at;
  const char* end;

  __attribute__((always_inline)) void ask(int lines) {
    for (int i = 0; i < lines && at < end; i++, at += 64) {
      __builtin_prefetch(at, 0, 2);
    }
  }
};

// `next` is asked for meanwhile, as many bytes for each key as its values have.
template <int ROWS, int VECTORS, class T>
EDGER1_INLINE void weighted_values(float* out, int64_t out_stride, const float* p, int64_t p_stride, int n,
                                   const T* values, const KeyBlock& block, Asked& next) {
  constexpr int lines = (VECTORS * kWidth * static_cast<int>(sizeof(T)) + 63) / 64;
  vf acc[ROWS][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      acc[r][v] = vf{};
    }
  }
  each_key(block, values, n, [&](int j, const T* row) __attribute__((always_inline)) {
    next.ask(lines);
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

constexpr int kKeysAhead = 32;
constexpr int kAskedBySoftmax = 24;   // lines that memory gives while a row's exponentials are computed

template <class T>
EDGER1_INLINE void all_key_scores(float* scores, int64_t stride, const float* queries, int rows, const T* const* keys,
                                  int dim) {
  int r = 0;
  for (; r + kScoreRows <= rows; r += kScoreRows) {
    key_scores<kScoreRows>(scores + r * stride, stride, queries + int64_t{r} * dim, keys, dim);
  }
  if (kScoreRows == 4 && rows - r == 3) {
    key_scores<3>(scores + r * stride, stride, queries + int64_t{r} * dim, keys, dim);
  } else if (kScoreRows == 4 && rows - r == 2) {
    key_scores<2>(scores + r * stride, stride, queries + int64_t{r} * dim, keys, dim);
  } else if (rows - r == 1) {
    key_scores<1>(scores + r * stride, stride, queries + int64_t{r} * dim, keys, dim);
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
  // Rows that lie one after the other are what the processor reads ahead by itself.
  bool dense = block.key_stride == block.head_dim && block.value_stride == block.value_dim;
  for (int j = lead / kWidth * kWidth; j < most; j += kWidth) {
    const T* at[kWidth];
    if (dense && j >= lead && j + kWidth <= most && (j + kWidth <= block.turn || j >= block.turn)) {
      int64_t row = j - lead + (j < block.turn ? 0 : block.jump);
      for (int i = 0; i < kWidth; i++) {
        at[i] = keys + (row + i) * block.key_stride;
      }
      // Values for what follows this loop: memory is far, and most keys were asked for while the last values were summed.
      const char* then = reinterpret_cast<const char*>(values + row * block.value_stride);
      const char* end = then + int64_t{kWidth} * block.value_dim * static_cast<int64_t>(sizeof(T));
      for (; then + 512 <= end; then += 512) {
#pragma GCC unroll 8
        for (int line = 0; line < 8; line++) {
          __builtin_prefetch(then + 64 * line, 0, 2);
        }
      }
      for (; then < end; then += 64) {
        __builtin_prefetch(then, 0, 2);
      }
    } else {
      for (int i = 0; i < kWidth; i++) {
        int key = j + i < lead ? lead : j + i < most ? j + i : most - 1;
        int64_t row = key - lead + (key < block.turn ? 0 : block.jump);
        at[i] = keys + row * block.key_stride;
        ask_for<3>(at[i] + kKeysAhead * block.key_stride, block.head_dim);
        ask_for<2>(values + row * block.value_stride, block.value_dim);
      }
    }
    all_key_scores(scores + j, stride, queries, rows, at, block.head_dim);
  }
  Asked next{static_cast<const char*>(block.next), static_cast<const char*>(block.next) + block.next_bytes};
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
    // Memory has nothing else to do while exponentials are computed.
    next.ask(kAskedBySoftmax);
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
        weighted_values<4, 4>(out + r * dim, dim, scores + r * stride, stride, most, from, block, next);
      }
      if (rows - r == 3) {
        weighted_values<3, 4>(out + r * dim, dim, scores + r * stride, stride, most, from, block, next);
      } else if (rows - r == 2) {
        weighted_values<2, 4>(out + r * dim, dim, scores + r * stride, stride, most, from, block, next);
      } else if (rows - r == 1) {
        weighted_values<1, 4>(out + r * dim, dim, scores + r * stride, stride, most, from, block, next);
      }
      d += 4 * kWidth;
    } else if (d + kWidth <= dim) {
      for (int r = 0; r < rows; r++) {
        weighted_values<1, 1, T>(out + r * dim, dim, scores + r * stride, stride, most, from, block, next);
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
        online_softmax, scale_row, blend_row, blend_rows                                                                           \
  }

} // namespace edger1
