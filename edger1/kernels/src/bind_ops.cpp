#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>

#include "bindings.h"
#include "dense.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edger1 {

void bind_ops(nb::module_& m) {
  m.def("matmul", &dense_matmul, "a"_a, "b"_a, nb::kw_only(), "stream"_a = nb::none(), "As mlx.core.matmul.");
  m.def("addmm", &dense_addmm, "c"_a, "a"_a, "b"_a, "alpha"_a = 1.0f, "beta"_a = 1.0f, nb::kw_only(),
        "stream"_a = nb::none(), "As mlx.core.addmm.");
  m.def("gather_mm", &dense_gather_mm, "a"_a, "b"_a, "lhs_indices"_a = nb::none(), "rhs_indices"_a = nb::none(),
        nb::kw_only(), "sorted_indices"_a = false, "stream"_a = nb::none(), "As mlx.core.gather_mm.");
}

} // namespace edger1
