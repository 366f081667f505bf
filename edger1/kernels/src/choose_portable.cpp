#include "choose_body.h"

namespace edger1 {
const ChooseOps choose_portable = EDGER1_CHOOSE_OPS;
} // namespace edger1
