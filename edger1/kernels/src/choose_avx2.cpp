#if defined(__AVX2__)
#include "choose_body.h"

namespace edger1 {
const ChooseOps choose_avx2 = EDGER1_CHOOSE_OPS;
} // namespace edger1
#endif
