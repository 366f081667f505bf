#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/variant.h>

#include "bindings.h"
#include "draw.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edger1 {

void bind_choose(nb::module_& m) {
  m.def("split_key", &split_key, "key"_a, "Keys for the next draws and for this one, as mx.random.split gives them.");
  m.def("draw_token", [](const mx::array& scores, uint64_t key, float inverse_temperature, float top_p, float min_p,
                         int top_k, mx::StreamOrDevice s) {
    return draw_token(scores, key, {inverse_temperature, top_p, min_p, top_k}, s);
  }, "scores"_a, "key"_a, nb::kw_only(), "inverse_temperature"_a = 1.0f, "top_p"_a = 0.0f, "min_p"_a = 0.0f,
        "top_k"_a = 0, "stream"_a = nb::none(), "One token id drawn from scores [1, vocabulary].");
}

} // namespace edger1
