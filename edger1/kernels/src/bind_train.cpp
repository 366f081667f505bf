#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "train_ops.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edger1 {

// Float32 arrays of exactly the shapes that train_ops.h names; ValueError otherwise.
void bind_train(nb::module_& m) {
  m.def("mixed_matmul", &mixed_matmul, "a"_a, "b"_a);
  m.def("experts", &experts, "x"_a, "indices"_a, "shares"_a, "weights"_a, "mixed"_a);
  m.def("experts_vjp", &experts_vjp, "x"_a, "indices"_a, "shares"_a, "weights"_a, "cotangent"_a, "mixed"_a);
  m.def("cross_entropy", &cross_entropy, "x"_a, "head"_a, "targets"_a, "weights"_a, "mixed"_a);
  m.def("document_attention",
        [](const mx::array& q, const mx::array& kv, const mx::array& rope, const mx::array& starts, float scale,
           float base, bool interleaved, bool mixed) {
          return document_attention(q, kv, rope, starts, {scale, base, interleaved}, mixed);
        },
        "q"_a, "kv"_a, "rope"_a, "starts"_a, "scale"_a, "base"_a, "interleaved"_a, "mixed"_a);
  m.def("document_attention_vjp",
        [](const mx::array& q, const mx::array& kv, const mx::array& rope, const mx::array& starts,
           const mx::array& cotangent, float scale, float base, bool interleaved, bool mixed) {
          return document_attention_vjp(q, kv, rope, starts, cotangent, {scale, base, interleaved}, mixed);
        },
        "q"_a, "kv"_a, "rope"_a, "starts"_a, "cotangent"_a, "scale"_a, "base"_a, "interleaved"_a, "mixed"_a);
  m.def("add_norm", &add_norm, "x"_a, "y"_a, "weight"_a, "eps"_a);
  m.def("add_norm_vjp", &add_norm_vjp, "sum"_a, "weight"_a, "d_sum"_a, "d_normed"_a, "eps"_a);
  m.def("best_experts", &best_experts, "scores"_a, "chosen"_a);
  m.def("adamw", &adamw, "weights"_a, "gradient"_a, "m"_a, "v"_a, "gradient_scale"_a, "rate"_a, "beta1"_a, "beta2"_a,
        "epsilon"_a, "decay"_a, "first"_a, "second"_a);
  m.def("orthogonal", &orthogonal, "matrices"_a, "mixed"_a);
  m.def("blend", &blend, "x"_a, "a"_a, "y"_a, "b"_a, "a x + b y.");
  m.def("squared_norm", &squared_norm, "x"_a);
}

} // namespace edger1
