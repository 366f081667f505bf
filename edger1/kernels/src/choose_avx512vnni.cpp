#if defined(__AVX512F__)
#include "choose_body.h"

namespace edger1 {
const ChooseOps choose_avx512vnni = EDGER1_CHOOSE_OPS;
} // namespace edger1
#endif
