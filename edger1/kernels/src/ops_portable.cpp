#include "attention_body.h"

namespace edger1 {
const OpsTable ops_portable = EDGER1_OPS_TABLE("portable");
} // namespace edger1
