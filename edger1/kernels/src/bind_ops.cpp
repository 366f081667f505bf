#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "append.h"
#include "attention.h"
#include "bindings.h"
#include "dense.h"
#include "rope.h"
#include "rows.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edger1 {
namespace {

template <Unary op>
void bind_activation(nb::module_& m, const char* name) {
  // Plain numbers too, as mlx.core takes them.
  m.def(name, [](const std::variant<mx::array, double>& x, mx::StreamOrDevice s) {
    const auto* a = std::get_if<mx::array>(&x);
    return activation(op, a ? *a : mx::array(static_cast<float>(std::get<double>(x))), s);
  }, "x"_a, nb::kw_only(), "stream"_a = nb::none());
}

template <Gate op>
void bind_gate(nb::module_& m, const char* name) {
  m.def(name, [](const mx::array& gate, const mx::array& x) { return gated(op, gate, x); }, "gate"_a, "x"_a);
}

} // namespace

// Names and arguments are those of mlx.core (and mlx.nn for activations), because these functions take their places.
void bind_ops(nb::module_& m) {
  auto none = nb::none();
  m.def("matmul", &dense_matmul, "a"_a, "b"_a, nb::kw_only(), "stream"_a = none);
  m.def("addmm", &dense_addmm, "c"_a, "a"_a, "b"_a, "alpha"_a = 1.0f, "beta"_a = 1.0f, nb::kw_only(),
        "stream"_a = none);
  m.def("gather_mm", &dense_gather_mm, "a"_a, "b"_a, "lhs_indices"_a = none, "rhs_indices"_a = none, nb::kw_only(),
        "sorted_indices"_a = false, "stream"_a = none);
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a.none(), "eps"_a, nb::kw_only(), "stream"_a = none);
  m.def("layer_norm", &layer_norm, "x"_a, "weight"_a.none(), "bias"_a.none(), "eps"_a, nb::kw_only(),
        "stream"_a = none);
  m.def("assign_rows",
        [](mx::array& buffer, int start, int stop, const mx::array& rows) {
          bool fits = on_cpu({}) && rows.dtype() == buffer.dtype() && buffer.ndim() >= 2 &&
              buffer.ndim() <= RowMap::kMaxAxes && rows.ndim() == buffer.ndim() && 0 <= start && start < stop &&
              stop <= buffer.shape(-2) && rows.shape(-2) == stop - start && rows.size() > 0;
          for (int i = 0; fits && i < static_cast<int>(buffer.ndim()); i++) {
            fits = i == static_cast<int>(buffer.ndim()) - 2 || rows.shape(i) == buffer.shape(i);
          }
          if (fits) {
            buffer.overwrite_descriptor(append_rows(buffer, rows, start));
          }
          return fits;
        },
        "buffer"_a, "start"_a, "stop"_a, "rows"_a, "buffer[..., start:stop, :] = rows, if that fits; says whether.");
  m.def("softmax", &softmax, "a"_a, "axis"_a = none, nb::kw_only(), "precise"_a = false, "stream"_a = none);
  m.def("logsumexp", &logsumexp, "a"_a, "axis"_a = none, "keepdims"_a = false, nb::kw_only(), "stream"_a = none);
  m.def("argmax", &argmax, "a"_a, "axis"_a = none, "keepdims"_a = false, nb::kw_only(), "stream"_a = none);
  m.def("rope", &rope, "a"_a, "dims"_a, nb::kw_only(), "traditional"_a, "base"_a.none(), "scale"_a, "offset"_a,
        "freqs"_a = none, "stream"_a = none);
  m.def("scaled_dot_product_attention", &attention, "q"_a, "k"_a, "v"_a, nb::kw_only(), "scale"_a, "mask"_a = none,
        "sinks"_a = none, "force_fused"_a = false, "stream"_a = none);
  bind_activation<Unary::exp>(m, "exp");
  bind_activation<Unary::sigmoid>(m, "sigmoid");
  bind_activation<Unary::silu>(m, "silu");
  bind_activation<Unary::tanh>(m, "tanh");
  bind_activation<Unary::gelu>(m, "gelu");
  bind_activation<Unary::gelu_tanh>(m, "gelu_approx");
  bind_activation<Unary::gelu_fast>(m, "gelu_fast_approx");
  bind_gate<Gate::swiglu>(m, "swiglu");
  bind_gate<Gate::geglu>(m, "geglu");
  bind_gate<Gate::geglu_tanh>(m, "geglu_approx");
  m.def("swiglu_oai", [](const mx::array& gate, const mx::array& x, float alpha, float limit) {
    return gated(Gate::swiglu_oai, gate, x, alpha, limit);
  }, "gate"_a, "x"_a, "alpha"_a = 1.702f, "limit"_a = 7.0f);
}

} // namespace edger1
