#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "attention_quantized.h"
#include "bindings.h"
#include "dequantize.h"
#include "draw.h"
#include "packed_rows.h"
#include "select.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edger1 {

void bind_choose(nb::module_& m) {
  m.def("split_key", &split_key, "key"_a, "Keys for the next draws and for this one, as mx.random.split gives them.");
  m.def("penalized", &penalized, "scores"_a, "tokens"_a, "penalty"_a, "stream"_a = nb::none(),
        "Scores [1, vocabulary] with some tokens discouraged.");
  m.def("draw_token", [](const mx::array& scores, uint64_t key, float inverse_temperature, float top_p, float min_p,
                         int top_k, mx::StreamOrDevice s) {
    return draw_token(scores, key, {inverse_temperature, top_p, min_p, top_k}, s);
  }, "scores"_a, "key"_a, nb::kw_only(), "inverse_temperature"_a = 1.0f, "top_p"_a = 0.0f, "min_p"_a = 0.0f,
        "top_k"_a = 0, "stream"_a = nb::none(), "One token id drawn from scores [1, vocabulary].");
  m.def("draw_tokens", [](const mx::array& scores, const std::vector<std::tuple<uint64_t, float, float, float, int, float,
                                                              std::vector<int>>>& draws,
                          const std::optional<mx::array>& last, mx::StreamOrDevice s) {
    std::vector<Draw> all;
    for (const auto& [key, inverse_temperature, top_p, min_p, top_k, penalty, tokens] : draws) {
      all.push_back({key, {inverse_temperature, top_p, min_p, top_k}, penalty, tokens});
    }
    return draw_tokens(scores, std::move(all), last, s);
  }, "scores"_a, "draws"_a, "last"_a = nb::none(), "stream"_a = nb::none(),
        "A token id for each row of scores [B, vocabulary]; a draw is (key, inverse temperature or 0 for the largest, top_p, "
        "min_p, top_k, penalty, tokens to discourage), and `last` are tokens that are discouraged too.");
  m.def("dequantized_rows", &dequantized_rows, "w"_a, "scales"_a, "biases"_a.none(), "indices"_a, nb::kw_only(),
        "group_size"_a, "bits"_a, "mode"_a = "affine", "stream"_a = nb::none(),
        "Rows of a quantized matrix in float32, [*indices, columns].");
  m.def("packed_rows", &packed_rows, "x"_a, "group_size"_a, "bits"_a, "stream"_a = nb::none(),
        "Rows of floats [..., D] as quantized caches hold them: uint32 [..., D * bits / 32 + D / group_size].");
  m.def("covers_quantized_attention", &covers_quantized_attention, "q"_a, "k"_a, "v"_a, "mask"_a.none(), "group_size"_a,
        "bits"_a, "stream"_a = nb::none(), "Whether quantized_attention takes these arguments.");
  m.def("quantized_attention", &quantized_attention, "q"_a, "k"_a, "v"_a, "scale"_a, "mask"_a.none(), "group_size"_a,
        "bits"_a, "stream"_a = nb::none(), "Attention over keys and values that are affine-quantized, (codes, scales, biases) each.");
  // From here on names and arguments are those of mlx.core, because these functions take their places.
  auto none = nb::none();
  m.def("sort", &sort, "a"_a, "axis"_a.none() = -1, nb::kw_only(), "stream"_a = none);
  m.def("argsort", &argsort, "a"_a, "axis"_a.none() = -1, nb::kw_only(), "stream"_a = none);
  m.def("partition", &partition, "a"_a, "kth"_a, "axis"_a.none() = -1, nb::kw_only(), "stream"_a = none);
  m.def("argpartition", &argpartition, "a"_a, "kth"_a, "axis"_a.none() = -1, nb::kw_only(), "stream"_a = none);
  m.def("topk", &topk, "a"_a, "k"_a, "axis"_a.none() = -1, nb::kw_only(), "stream"_a = none);
}

} // namespace edger1
