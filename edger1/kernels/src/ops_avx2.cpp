#if defined(__AVX2__)
#include "attention_body.h"

namespace edger1 {
const OpsTable ops_avx2 = EDGER1_OPS_TABLE("avx2");
} // namespace edger1
#endif
