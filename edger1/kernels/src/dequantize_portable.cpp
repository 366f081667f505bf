#include "dequantize_body.h"

namespace edger1 {
const DequantizeOps dequantize_portable = {dequantize_row, back};
} // namespace edger1
