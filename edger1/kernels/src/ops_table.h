// What each instruction set offers to the dense operations: plain functions on pointers, without threads or MLX.
//
// The caller splits the work (pool.h), picks pointers and strides (the primitives) and owns all memory. Strides count elements.
#pragma once

#include <cstdint>

namespace edger1 {

enum class Float { f32, bf16, f16 };

inline int64_t bytes_of(Float type) {
  return type == Float::f32 ? 4 : 2;
}
inline const void* offset(const void* p, Float type, int64_t elements) {
  return static_cast<const char*>(p) + elements * bytes_of(type);
}
inline void* offset(void* p, Float type, int64_t elements) {
  return static_cast<char*>(p) + elements * bytes_of(type);
}

enum class Unary { exp, sigmoid, silu, tanh, gelu, gelu_tanh, gelu_fast };
enum class Gate { swiglu, geglu, geglu_tanh, swiglu_oai };

// What one query row needs of a block of keys; see attention_rows.
struct KeyBlock {
  const void* keys;                  // of the first key that is there
  const void* values;
  Float type;
  int64_t key_stride, value_stride;
  int n_keys;
  int head_dim, value_dim;
  int lead = 0;                      // keys [0, lead) of the block are not there
  int turn = 1 << 30;                // from this key on, which comes after `lead`, memory goes on `jump` keys further
  int64_t jump = 0;
  float soft_cap = 0;                // where not 0, scores become soft_cap * tanh(score / soft_cap)
  const void* next = nullptr;        // what the caller reads after this block, to be asked for meanwhile: only a hint
  int64_t next_bytes = 0;
};

// Rows of a boolean (keep where true) or additive float32 mask over a block of keys; `row_stride` leads from one query row
// to the next and `key_stride` from one key to the next.
struct MaskRows {
  const bool* keep = nullptr;
  const float* add = nullptr;
  int64_t row_stride = 0, key_stride = 0;
};

struct OpsTable {
  const char* name;

  void (*to_f32)(float* out, const void* in, Float type, int64_t n);
  void (*from_f32)(void* out, Float type, const float* in, int64_t n);

  // Blocked matrix product. A block of A is packed as panels of `mr` rows, each k-major (the last panel as narrow as what
  // is left), a block of B as panels of `nr` columns (the last padded with zeros).
  int mr, nr;
  void (*pack_a)(float* out, const void* a, Float type, int64_t row_stride, int64_t k_stride, int rows, int k);
  void (*pack_b)(float* out, const void* b, Float type, int64_t k_stride, int64_t column_stride, int k, int columns);
  // c (m x n) = or += packed a * packed b; every element is one chain of fused additions over k, whatever m and n are.
  void (*gemm)(float* c, int64_t c_stride, const float* a, const float* b, int m, int n, int k, bool accumulate);

  // Few rows: out[i, j] = sum_k x[i, k] w[j, k] for columns [j0, j1) of w stored row by row (dot_rows), or with w[k, j]
  // (axpy_rows). A row's result does not depend on how many rows there are.
  void (*dot_rows)(float* out, int64_t out_stride, const float* x, int64_t x_stride, int rows, const void* w, Float type,
                   int64_t w_stride, int k, int64_t j0, int64_t j1);
  void (*axpy_rows)(float* out, int64_t out_stride, const float* x, int64_t x_stride, int rows, const void* w,
                    Float type, int64_t w_stride, int k, int64_t j0, int64_t j1);

  // Rows of n contiguous floats.
  void (*rms_norm)(float* out, const float* x, const float* weight, int n, float eps);
  // dx, and weight gradient added to dw, of rms_norm for one row.
  void (*rms_norm_vjp)(float* dx, float* dw, const float* x, const float* weight, const float* dy, int n, float eps);
  void (*layer_norm)(float* out, const float* x, const float* weight, const float* bias, int n, float eps);
  void (*softmax)(float* out, const float* x, int n);
  void (*softmax_vjp)(float* dx, const float* y, const float* dy, int n);
  float (*log_sum_exp)(const float* x, int n);
  int64_t (*argmax)(const float* x, int64_t n);

  // Rotates one head of one position by the angles whose cosines and sines are given (half_dims of each); in place or not.
  // inverse rotates back.
  void (*rope)(float* out, const float* x, const float* cosines, const float* sines, int half_dims, bool interleaved,
               bool inverse);

  void (*unary)(Unary op, float* out, const float* x, int64_t n);
  void (*unary_vjp)(Unary op, float* dx, const float* x, const float* dy, int64_t n);
  // out = f(gate) * x; alpha and limit are those of swiglu_oai.
  void (*gate)(Gate op, float* out, const float* gate, const float* x, int64_t n, float alpha, float limit);
  void (*gate_vjp)(Gate op, float* d_gate, float* dx, const float* gate, const float* x, const float* dy, int64_t n,
                   float alpha, float limit);

  // Attention of `rows` scaled query rows (row-major, head_dim each) over one block of keys. Keys lead .. visible[r] - 1 of
  // the block count for row r; those beyond are not there. Writes for each row the maximum score, the sum of exponentials and
  // the weighted sum of values (value_dim each, unnormalised), `scores` being scratch for rows * (n_keys + 16) floats.
  // A row's result depends on nothing but its own query, keys, values, mask and visible count.
  void (*attention_rows)(float* maxima, float* sums, float* accumulated, const float* queries, int rows,
                         const KeyBlock& block, const int* visible, const MaskRows* masks, float* scores);
  // One row of online softmax over n scores in place: returns the factor for what was accumulated before.
  float (*online_softmax)(float* scores, int n, float* maximum, float* sum);
  void (*scale_row)(float* x, float factor, int n);
  // acc = acc * a + x * b
  void (*blend_row)(float* acc, float a, const float* x, float b, int n);
  // blend_row for `count` rows x, `stride` apart, one after the other.
  void (*blend_rows)(float* acc, const float* a, const float* x, int64_t stride, const float* b, int count, int n);
};

// The table of the instruction set in use (cpu_features.h).
const OpsTable& ops();

extern const OpsTable ops_portable;
extern const OpsTable ops_avx2;
extern const OpsTable ops_avx512vnni;
extern const OpsTable ops_neon;

} // namespace edger1
