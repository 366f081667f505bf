#if defined(__AVX2__)
#include "update_body.h"

namespace edger1 {
const UpdateTable update_avx2 = EDGER1_UPDATE_TABLE;
} // namespace edger1
#endif
