// For processors with none of the instruction sets that have a source of their own.
#include "qmm_tables.h"
#include "qmm_vector.h"

namespace edger1 {
namespace {

inline f8 fma8(f8 a, f8 b, f8 c) {
  return a * b + c;
}

inline f8 expand8(const uint8_t* p) {
  f8 v;
  for (int i = 0; i < 8; i++) {
    v[i] = static_cast<float>(p[i]);
  }
  return v;
}

inline void convert(const void* from, ScaleType type, int64_t count, float* to) {
  convert_any(from, type, count, to);
}

template <class F>
inline b32 decode32(const uint8_t* p) {
  return decode32_any<F>(p);
}

template <class F>
inline i8 dot32(b32 codes, const int8_t* x) {
  alignas(32) uint8_t code[32];
  store32(code, codes);
  i8 sum{};
  for (int j = 0; j < 8; j++) {
    for (int i = 0; i < 4; i++) {
      sum[j] += static_cast<int32_t>(code[4 * j + i]) * x[4 * j + i];
    }
  }
  return sum;
}

// Sums over a block's 8 steps of 4 products, for 4 rows and 16 columns: panel steps are 128 bytes apart, x's 16.
template <class F>
inline void block_dot(const uint8_t* panel, const int8_t* x, i8 (*sum)[2]) {
  for (int m = 0; m < 4; m++) {
    for (int half = 0; half < 2; half++) {
      i8 total{};
      for (int j = 0; j < 8; j++) {
        for (int c = 0; c < 8; c++) {
          const uint8_t* w = panel + j * 128 + half * 32 + c * 4;
          const int8_t* v = x + j * 16 + m * 4;
          total[c] += w[0] * v[0] + w[1] * v[1] + w[2] * v[2] + w[3] * v[3];
        }
      }
      sum[m][half] = total;
    }
  }
}

} // namespace
} // namespace edger1

#include "qmm_generic.h"

namespace edger1 {
const QmmKernels* const qmm_portable = &table;
} // namespace edger1
