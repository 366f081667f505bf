#include <nanobind/stl/string.h>

#include "bind_watched.h"
#include "bindings.h"

namespace edger1 {

using namespace nb::literals;

void bind_decoder(nb::module_& m) {
  nb::class_<WatchedLayer>(m, "DecoderLayer", "A decoder layer, or its attention, as one operation over up to 16 rows.")
      .def("__init__",
           [](WatchedLayer* self, int heads, int kv_heads, int head_dim, float attention_scale, float residual_scale,
              float soft_cap, const std::string& activation, const std::string& precision, bool parallel, bool residual,
              bool norms_after_rope) {
             new (self) WatchedLayer({heads, kv_heads, head_dim, attention_scale, residual_scale, soft_cap, activation,
                                      precision, parallel, residual, norms_after_rope});
           },
           nb::kw_only(), "heads"_a, "kv_heads"_a, "head_dim"_a, "attention_scale"_a, "residual_scale"_a = 1.0f,
           "soft_cap"_a = 0.0f, "activation"_a = "swiglu", "precision"_a = "exact", "parallel"_a = false,
           "residual"_a = true, "norms_after_rope"_a = false)
      .def("project",
           [](WatchedLayer& self, const std::string& name, const mx::array& w, const std::optional<mx::array>& scales,
              const std::optional<mx::array>& biases, const std::optional<mx::array>& bias, int group_size, int bits,
              const std::string& mode) { self.layer.project(name, w, scales, biases, bias, group_size, bits, mode); },
           "name"_a, "w"_a, "scales"_a = nb::none(), "biases"_a = nb::none(), "bias"_a = nb::none(), "group_size"_a = 64,
           "bits"_a = 4, "mode"_a = "affine")
      .def("norm", [](WatchedLayer& self, const std::string& name, const mx::array& weight, float eps, bool centered,
                      const std::optional<mx::array>& bias) { self.layer.norm(name, weight, eps, centered, bias); },
           "name"_a, "weight"_a, "eps"_a, "centered"_a = false, "bias"_a = nb::none())
      .def("sinks", [](WatchedLayer& self, const mx::array& sinks) { self.layer.sinks(sinks); }, "sinks"_a)
      .def("rope",
           [](WatchedLayer& self, int dims, bool interleaved, std::optional<float> base,
              const std::optional<mx::array>& freqs, float scale,
              float multiplier) { self.layer.rope(dims, interleaved, base, freqs, scale, multiplier); },
           "dims"_a, "interleaved"_a, "base"_a = nb::none(), "freqs"_a = nb::none(), "scale"_a = 1.0f,
           "multiplier"_a = 1.0f)
      .def("finish", [](WatchedLayer& self) { self.layer.finish(); })
      .def("watch", &WatchedLayer::watch, "owner"_a.none(), "key"_a, "value"_a,
           "Apply only while owner[key] is value; without an owner, the called module's.")
      .def("__call__", &WatchedLayer::call, "module"_a, "x"_a, "mask"_a.none(), "keys"_a.none(), "values"_a.none(),
           "offset"_a, "first_slot"_a = 0, "count"_a = nb::none(), "starts"_a = nb::none(),
           "bits"_a = 0, "group"_a = 0,
           "The layer's result, keys and values, and the MLP's input where the layer ends before it; None where the "
           "operation does not apply. See decoder.h for first_slot, count and starts; bits and group are those of "
           "packed rows.")
      .def("prefill", &WatchedLayer::prefill, "module"_a, "x"_a, "keys"_a.none(), "values"_a.none(), "offset"_a,
           "capacity"_a, "The same for more than 16 positions with a causal mask; None where that does not apply.");
}

} // namespace edger1
