#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>

#include "bindings.h"
#include "qmm.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edger1 {

void bind_qmm(nb::module_& m) {
  m.def("qmm", &qmm, "x"_a, "w"_a, "scales"_a, "biases"_a = nb::none(), "transpose"_a = true, "group_size"_a = 64,
        "bits"_a = 4, "mode"_a = "affine", "precision"_a = "exact", nb::kw_only(), "bias_ratio"_a = 0.0f,
        "stream"_a = nb::none(), "x @ w.T, or x @ w, with quantized w.");
  m.def("bias_ratio", &bias_ratio, "w"_a, "scales"_a, "biases"_a, "group_size"_a, "bits"_a,
        "What multiplies scales to biases, where all biases of an evaluated matrix follow so; else 0.");
  m.def("gather_qmm", &gather_qmm, "x"_a, "w"_a, "scales"_a, "biases"_a = nb::none(), "lhs_indices"_a = nb::none(),
        "rhs_indices"_a = nb::none(), "transpose"_a = true, "group_size"_a = 64, "bits"_a = 4, "mode"_a = "affine",
        "precision"_a = "exact", nb::kw_only(), "stream"_a = nb::none(), "qmm for pairs of matrices chosen by index.");
}

} // namespace edger1
