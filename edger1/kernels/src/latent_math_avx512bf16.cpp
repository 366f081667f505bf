// bf16 in vectors, for processors that have products of it but no matrix tiles: both operands are rounded to bf16 and added
// up in f32, at twice the rate of f32.
#include "latent_math.h"

#if defined(__AVX512BF16__)
#include "bf16_vectors.h"

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

void gemm(float* c, int64_t c_stride, const LatentProduct* products, int count, int m, int n, bool accumulate) {
  for (int i = 0; i < count; i++) {
    if (products[i].k > 0) {
      multiply_panels(c, c_stride, products[i].a, products[i].b, m, n, products[i].k, accumulate);
      accumulate = true;
    }
  }
}

const LatentMath kMath{128, 16, a_bytes, b_bytes, pack_rows, pack_columns, gemm};

} // namespace

const LatentMath* const latent_math_bf16 = &kMath;

} // namespace edger1
#else
namespace edger1 {
const LatentMath* const latent_math_bf16 = nullptr;
} // namespace edger1
#endif
