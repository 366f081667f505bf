#include "decoder_plan.h"
#include "few_rows.h"
#include "qmm_driver.h"

namespace edger1 {
namespace {

int64_t scale_bytes(ScaleType type) {
  return type == ScaleType::f32 ? 4 : type == ScaleType::e8m0 ? 1 : 2;
}

} // namespace

int64_t Projection::row_bytes() const {
  if (!quantized) {
    return int64_t{k} * bytes_of(plain_type);
  }
  return int64_t{k} * w.bits / 8 + (w.fp4 ? 1 : 2) * int64_t{k / w.group} * scale_bytes(w.type);
}

int64_t Projection::prepared_bytes(bool fast) const {
  return quantized ? prepared_layout(k, fast).bytes : int64_t{k} * 4;
}

void Projection::multiply(bool fast, const char* prepared, int64_t stride, int m, int n0, int n1, float* const* out) const {
  if (quantized) {
    const void* x[kMaxRows];
    for (int i = 0; i < m; i++) {
      x[i] = prepared + i * stride;
    }
    (fast ? qmm_kernels().rows_fast : qmm_kernels().rows_exact)(w, x, m, n0, n1, out);
  } else {
    int64_t out_stride = m > 1 ? out[1] - out[0] : 0;
    ops().dot_rows(out[0] - n0, out_stride, reinterpret_cast<const float*>(prepared), stride / 4, m, plain, plain_type,
                   plain_stride, k, n0, n1);
  }
  for (int i = 0; i < m && bias; i++) {
    ops().blend_row(out[i], 1, bias + n0, 1, n1 - n0);
  }
}

void finish_plan(DecoderPlan& plan) {
  Projection* stages[4][3] = {{&plan.q, &plan.k, &plan.v}, {&plan.o}, {&plan.gate, &plan.up}, {&plan.down}};
  for (int stage = 0; stage < 4; stage++) {
    for (Projection* p : stages[stage]) {
      if (p && p->n > 0) {
        p->form = form_index(plan.forms[stage], *p);
      }
    }
  }
}

} // namespace edger1
