#include "qmm_tables.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "qmm_avx2_body.h"

namespace edger1 {
const QmmKernels* const qmm_avx2 = &table;
} // namespace edger1
#else
namespace edger1 {
const QmmKernels* const qmm_avx2 = nullptr;
} // namespace edger1
#endif
