#include "dequantize_ops.h"
#include "latent_plan.h"

namespace edger1 {
namespace {

// mxfp4 has no scales of a float type.
Float float_type(ScaleType type) {
  return type == ScaleType::f16 ? Float::f16 : type == ScaleType::bf16 ? Float::bf16 : Float::f32;
}

const void* group_at(const void* groups, int64_t row_offset, ScaleType type, int group) {
  int64_t bytes = type == ScaleType::f32 ? 4 : type == ScaleType::e8m0 ? 1 : 2;
  return static_cast<const char*>(groups) + row_offset + group * bytes;
}

} // namespace

void widen_row(const Projection& p, int row, int first, int count, float* out) {
  if (!p.quantized) {
    ops().to_f32(out, offset(p.plain, p.plain_type, row * p.plain_stride + first), p.plain_type, count);
    return;
  }
  const QuantMatrix& w = p.w;
  int group = first / w.group;
  const uint8_t* codes = w.codes + row * w.row_bytes + int64_t{first} * w.bits / 8;
  const void* biases = w.fp4 ? nullptr : group_at(w.biases, row * w.bias_stride, w.type, group);
  dequantize_ops().row(out, {codes, group_at(w.scales, row * w.scale_stride, w.type, group), biases, float_type(w.type),
                             w.group, w.bits, w.fp4}, count);
}

void widen(const Projection& p, float* out) {
  for (int n = 0; n < p.n; n++) {
    widen_row(p, n, 0, p.k, out + int64_t{n} * p.k);
  }
}

} // namespace edger1
