#if defined(__AVX2__)
#include "dequantize_body.h"

namespace edger1 {
const DequantizeOps dequantize_avx2 = {dequantize_row, back};
} // namespace edger1
#endif
