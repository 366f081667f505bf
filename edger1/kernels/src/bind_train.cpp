#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "train_ops.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edger1 {

// Float32 arrays of exactly the shapes that train_ops.h names; ValueError otherwise.
void bind_train(nb::module_& m) {
  m.def("mixed_matmul", &mixed_matmul, "a"_a, "b"_a);
  m.def("experts", &experts, "x"_a, "indices"_a, "shares"_a, "gate"_a, "up"_a, "down"_a, "mixed"_a);
  m.def("experts_vjp", &experts_vjp, "x"_a, "indices"_a, "shares"_a, "gate"_a, "up"_a, "down"_a, "cotangent"_a,
        "mixed"_a);
  m.def("cross_entropy", &cross_entropy, "x"_a, "head"_a, "targets"_a, "weights"_a, "mixed"_a);
  m.def("document_attention", &document_attention, "q"_a, "k"_a, "v"_a, "starts"_a, "scale"_a, "mixed"_a);
  m.def("document_attention_vjp", &document_attention_vjp, "q"_a, "k"_a, "v"_a, "starts"_a, "cotangent"_a, "scale"_a,
        "mixed"_a);
  m.def("adamw", &adamw, "weights"_a, "gradient"_a, "m"_a, "v"_a, "gradient_scale"_a, "rate"_a, "beta1"_a, "beta2"_a,
        "epsilon"_a, "decay"_a, "first"_a, "second"_a);
  m.def("blend", &blend, "x"_a, "a"_a, "y"_a, "b"_a, "a x + b y.");
  m.def("squared_norm", &squared_norm, "x"_a);
}

} // namespace edger1
