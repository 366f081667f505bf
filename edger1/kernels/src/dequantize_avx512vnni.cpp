#if defined(__AVX512F__)
#include "dequantize_body.h"

namespace edger1 {
const DequantizeOps dequantize_avx512vnni = {dequantize_row, back};
} // namespace edger1
#endif
