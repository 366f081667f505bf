// Loops over all weights that optimizers need, one table for each instruction set; plain functions on pointers.
#pragma once

#include <cstdint>

namespace edger1 {

struct AdamW {
  float gradient_scale, rate, beta1, beta2, epsilon, decay;
  float first, second; // 1 - beta^step of both moments
};

struct UpdateTable {
  // The moments of n weights and the weights after a step; outputs may be the inputs.
  void (*adamw)(float* w_out, float* m_out, float* v_out, const float* w, const float* g, const float* m, const float* v,
                int64_t n, const AdamW& with);
  // out = a x + b y
  void (*blend)(float* out, const float* x, float a, const float* y, float b, int64_t n);
  // Sum of squares, in double across vectors' worth of n.
  double (*squares)(const float* x, int64_t n);
};

const UpdateTable& update_table();

extern const UpdateTable update_portable;
extern const UpdateTable update_avx2;
extern const UpdateTable update_avx512vnni;
extern const UpdateTable update_neon;

} // namespace edger1
