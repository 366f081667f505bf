#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu_features.h"

namespace nb = nanobind;

NB_MODULE(_ext, m) {
  m.doc() = "EdgeR1's CPU kernels as MLX primitives.";
  m.attr("built_for_mlx") = EDGER1_MLX_VERSION;
  m.def("instruction_sets", &edger1::instruction_sets,
        "Instruction sets that this processor offers, in rising order of preference.");
}
