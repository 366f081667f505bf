#if defined(__aarch64__)
#include "attention_body.h"

namespace edger1 {
const OpsTable ops_neon = EDGER1_OPS_TABLE("neon");
} // namespace edger1
#endif
