#if defined(__aarch64__)
#include "dequantize_body.h"

namespace edger1 {
const DequantizeOps dequantize_neon = {dequantize_row, back};
} // namespace edger1
#endif
