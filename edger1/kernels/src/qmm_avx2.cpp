#include "qmm_tables.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "qmm_avx2_rows.h"

namespace edger1 {
namespace {
// Constant, since nothing here may run before it is known that the processor can.
constinit const QmmKernels chosen = with_steps(table);
} // namespace
const QmmKernels* const qmm_avx2 = &chosen;
} // namespace edger1
#else
namespace edger1 {
const QmmKernels* const qmm_avx2 = nullptr;
} // namespace edger1
#endif
