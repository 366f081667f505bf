// Packed operands of latent attention in bf16, alike for matrix tiles and for vectors. Included by sources compiled for
// AVX512-BF16 only; everything is in an anonymous namespace, as in bf16_pack.h.
#pragma once

#include "bf16_pack.h"
#include "latent_math.h"

namespace edger1 {
namespace {

int64_t a_bytes(int rows, int k) {
  return static_cast<int64_t>(panel_bytes(rows, k));
}
int64_t b_bytes(int k, int columns) {
  return static_cast<int64_t>(panel_bytes(columns, k));
}

void pack_rows(void* out, const void* a, Float type, int64_t row_stride, int64_t k_stride, int rows, int k) {
  pack(out, {a, type, row_stride, k_stride}, rows, k, false);
}
void pack_columns(void* out, const void* b, Float type, int64_t k_stride, int64_t column_stride, int k, int columns) {
  pack(out, {b, type, column_stride, k_stride}, columns, k, true);
}

} // namespace
} // namespace edger1
