// The tables of inner loops that this build has; null where the architecture has no such instruction set.
#pragma once

#include "qmm_kernels.h"

namespace edger1 {

extern const QmmKernels* const qmm_portable;
extern const QmmKernels* const qmm_avx2;
extern const QmmKernels* const qmm_avxvnni;
extern const QmmKernels* const qmm_avx512vnni;
extern const QmmKernels* const qmm_neon;

// The AVX-512 table with its large fast path on matrix tiles.
QmmKernels qmm_with_amx(QmmKernels avx512vnni);

} // namespace edger1
