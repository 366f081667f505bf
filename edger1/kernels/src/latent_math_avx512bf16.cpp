// bf16 in vectors, for processors that have products of it but no matrix tiles: both operands are rounded to bf16 and added
// up in f32, at twice the rate of f32.
#include "latent_math.h"

#if defined(__AVX512BF16__)
#include "bf16_vectors.h"
#include "latent_math_bf16.h"

namespace edger1 {
namespace {

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
