#include <algorithm>

#include "cpu_features.h"
#include "latent_math.h"

namespace edger1 {
namespace {

// A panel of B of so many steps of k stays in the first-level cache.
constexpr int kDepth = 256;

int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

int64_t a_bytes(int rows, int k) {
  return round_up(int64_t{rows} * k * 4, 64);
}

int64_t b_bytes(int k, int columns) {
  return round_up(round_up(columns, ops().nr) * k * 4, 64);
}

void pack_a(void* out, const void* a, Float type, int64_t row_stride, int64_t k_stride, int rows, int k) {
  auto* to = static_cast<float*>(out);
  for (int p = 0; p < k; p += kDepth) {
    int depth = std::min(kDepth, k - p);
    ops().pack_a(to, offset(a, type, p * k_stride), type, row_stride, k_stride, rows, depth);
    to += int64_t{rows} * depth;
  }
}

void pack_b(void* out, const void* b, Float type, int64_t k_stride, int64_t column_stride, int k, int columns) {
  auto* to = static_cast<float*>(out);
  for (int p = 0; p < k; p += kDepth) {
    int depth = std::min(kDepth, k - p);
    ops().pack_b(to, offset(b, type, p * k_stride), type, k_stride, column_stride, depth, columns);
    to += round_up(columns, ops().nr) * depth;
  }
}

void gemm(float* c, int64_t c_stride, const LatentProduct* products, int count, int m, int n, bool accumulate) {
  for (int i = 0; i < count; i++) {
    auto* a = static_cast<const float*>(products[i].a);
    auto* b = static_cast<const float*>(products[i].b);
    for (int p = 0; p < products[i].k; p += kDepth) {
      int depth = std::min(kDepth, products[i].k - p);
      ops().gemm(c, c_stride, a, b, m, n, depth, accumulate);
      accumulate = true;
      a += int64_t{m} * depth;
      b += round_up(n, ops().nr) * depth;
    }
  }
}

} // namespace

const LatentMath& latent_math(bool bf16) {
  static const LatentMath exact{static_cast<int>(round_up(112, ops().mr)), ops().mr, a_bytes, b_bytes, pack_a, pack_b, gemm};
  if (bf16 && latent_math_amx && active_isa_has_amx()) {
    return *latent_math_amx;
  }
  return bf16 && latent_math_bf16 && active_isa_has_bf16() ? *latent_math_bf16 : exact;
}

} // namespace edger1
