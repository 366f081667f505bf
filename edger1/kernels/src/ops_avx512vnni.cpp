#if defined(__AVX512F__)
#include "attention_body.h"

namespace edger1 {
const OpsTable ops_avx512vnni = EDGER1_OPS_TABLE("avx512vnni");
} // namespace edger1
#endif
