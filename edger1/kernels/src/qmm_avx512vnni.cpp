#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include "qmm_avx512_panel.h"
#include "qmm_avx512_tiles.h"
#include "qmm_tables.h"

namespace edger1 {
namespace {

void to_f32(const void* from, ScaleType type, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16) {
    __mmask16 mask = first16(count - i);
    _mm512_mask_storeu_ps(to + i, mask, load_scales(from, type, i, mask));
  }
}

void from_f32(const float* from, ScaleType type, int64_t count, void* to) {
  for (int64_t i = 0; i < count; i += 16) {
    __mmask16 mask = first16(count - i);
    __m512 value = _mm512_maskz_loadu_ps(mask, from + i);
    if (type == ScaleType::f32) {
      _mm512_mask_storeu_ps(static_cast<float*>(to) + i, mask, value);
      continue;
    }
    __m256i half;
    if (type == ScaleType::f16) {
      half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    } else {
      // Round to nearest even; a NaN stays one.
      __m512i bits = _mm512_castps_si512(value);
      __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q),
                                      _mm512_set1_epi32(0x7fc00000));
      half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + i, mask, half);
  }
}

void raise_to(const float* x, int64_t count, float* largest) {
  for (int64_t i = 0; i < count; i += 16) {
    __mmask16 mask = first16(count - i);
    __m512 value = _mm512_abs_ps(_mm512_maskz_loadu_ps(mask, x + i));
    _mm512_mask_storeu_ps(largest + i, mask, _mm512_max_ps(value, _mm512_maskz_loadu_ps(mask, largest + i)));
  }
}

const QmmKernels table{kTileFast,      kTileExact,     prepare_fast,  prepare_exact,       rows_fast,  rows_exact,
                       packed_x_bytes, pack_x_fast,    pack_x_exact,  panel_scratch_bytes, panel_fast, panel_exact,
                       packed_f32_bytes, pack_x_f32,   back_scratch_bytes, panel_back,     raise_to,   to_f32,     from_f32};

} // namespace

const QmmKernels* const qmm_avx512vnni = &table;

} // namespace edger1
#else
#include "qmm_tables.h"

namespace edger1 {
const QmmKernels* const qmm_avx512vnni = nullptr;
} // namespace edger1
#endif
