#if defined(__AVX512F__)
#include "update_body.h"

namespace edger1 {
const UpdateTable update_avx512vnni = EDGER1_UPDATE_TABLE;
} // namespace edger1
#endif
