// The mixed engine on processors with products of bf16 in vectors (AVX512-BF16: Zen 4, Cooper Lake and later) that have
// no matrix tiles: twice the rate of f32.
#include "gemm_engine.h"

#if defined(__AVX512BF16__)
#include "bf16_vectors.h"

namespace edger1 {
namespace {

const GemmEngine engine{Float::bf16, kPanelRows, panel_bytes, b_panel_bytes, pack_a, pack_b, multiply_panels};

} // namespace

const GemmEngine* const gemm_engine_bf16 = &engine;

} // namespace edger1
#else
namespace edger1 {
const GemmEngine* const gemm_engine_bf16 = nullptr;
} // namespace edger1
#endif
