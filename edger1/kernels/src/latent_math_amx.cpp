// Matrix tiles for bf16: both operands are rounded to bf16 and added up in f32.
#include "latent_math.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <cstring>

#include "amx_blocks.h"
#include "latent_math_bf16.h"

namespace edger1 {
namespace {

void copy_block(float* to, int64_t to_stride, const float* from, int64_t from_stride, int rows, int columns) {
  for (int i = 0; i < rows; i++) {
    std::memcpy(to + i * to_stride, from + i * from_stride, sizeof(float) * static_cast<size_t>(columns));
  }
}

void gemm(float* c, int64_t c_stride, const LatentProduct* products, int count, int m, int n, bool accumulate) {
  settle_memory();
  _tile_loadconfig(&kTileShapes);
  Block before;
  for (int j = 0; j < n; j += 32) {
    for (int i = 0; i < m; i += 32) {
      auto panels = [&](int p) {
        int64_t steps = ceil32(products[p].k);
        return Panels{static_cast<const uint8_t*>(products[p].a) + i / 32 * steps * kStepBytes,
                      static_cast<const uint8_t*>(products[p].b) + j / 32 * steps * kStepBytes, static_cast<int>(steps)};
      };
      float* to = c + i * c_stride + j;
      int rows = m - i < 32 ? m - i : 32, columns = n - j < 32 ? n - j : 32;
      if (rows == 32 && columns == 32) {
        Block block{to, c_stride};
        multiply_block(count, panels, accumulate ? block : Block{}, before);
        before = block;
        continue;
      }
      // The result has no room for whole tiles here.
      alignas(64) float sums[32 * 32] = {};
      if (accumulate) {
        copy_block(sums, 32, to, c_stride, rows, columns);
        settle_memory();
      }
      Block block{sums, 32};
      multiply_block(count, panels, accumulate ? block : Block{}, before);
      put_down(block);
      before = Block{};
      settle_memory();
      copy_block(to, c_stride, sums, 32, rows, columns);
    }
  }
  put_down(before);
  _tile_release();
  settle_memory();
}

const LatentMath kMath{128, 32, a_bytes, b_bytes, pack_rows, pack_columns, gemm};

} // namespace

const LatentMath* const latent_math_amx = &kMath;

} // namespace edger1
#else
namespace edger1 {
const LatentMath* const latent_math_amx = nullptr;
} // namespace edger1
#endif
