#if defined(__aarch64__)
#include "update_body.h"

namespace edger1 {
const UpdateTable update_neon = EDGER1_UPDATE_TABLE;
} // namespace edger1
#endif
