#if defined(__aarch64__)
#include "choose_body.h"

namespace edger1 {
const ChooseOps choose_neon = EDGER1_CHOOSE_OPS;
} // namespace edger1
#endif
