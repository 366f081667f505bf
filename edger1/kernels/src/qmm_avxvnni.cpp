#include "qmm_tables.h"

#if defined(__AVX2__) && defined(__AVXVNNI__)
#include "qmm_avx2_body.h"

namespace edger1 {
const QmmKernels* const qmm_avxvnni = &table;
} // namespace edger1
#else
namespace edger1 {
const QmmKernels* const qmm_avxvnni = nullptr;
} // namespace edger1
#endif
