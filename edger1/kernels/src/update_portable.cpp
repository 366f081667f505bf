#include "update_body.h"

namespace edger1 {
const UpdateTable update_portable = EDGER1_UPDATE_TABLE;
} // namespace edger1
