#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <vector>

#include "bindings.h"
#include "latent.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edger1 {
namespace {

// Latent attention together with the Python objects it was made from, which may be exchanged behind its back.
class WatchedLatent {
 public:
  explicit WatchedLatent(const LatentSettings& settings) : latent(settings) {}

  // It stands for `owner[key]` being `value`. Without an owner the module passed to the call is meant: holding that one
  // would be a cycle that is never collected.
  void watch(nb::object owner, nb::object key, nb::object value) {
    watched_.push_back({std::move(owner), std::move(key), std::move(value)});
  }

  bool applies(nb::handle module, const mx::array& x) const {
    if (x.is_tracer() || x.dtype() != mx::float32 || x.ndim() != 3 || x.size() == 0) {
      return false;
    }
    for (const auto& w : watched_) {
      PyObject* owner = w.owner.is_none() ? module.ptr() : w.owner.ptr();
      if (PyDict_GetItem(owner, w.key.ptr()) != w.value.ptr()) {
        return false;
      }
    }
    return true;
  }

  LatentAttention latent;

 private:
  struct Watched {
    nb::object owner, key, value;
  };
  std::vector<Watched> watched_;
};

} // namespace

void bind_latent(nb::module_& m) {
  m.def("is_traced", [](const mx::array& a) { return a.is_tracer(); }, "a"_a, "Whether a gradient is to flow through a.");
  nb::class_<WatchedLatent>(m, "LatentAttention", "Multi-head latent attention, by itself or with its projections.")
      .def("__init__",
           [](WatchedLatent* self, int heads, int nope, int rope, int rank, int value, float scale,
              const std::string& precision) {
             new (self) WatchedLatent({heads, nope, rope, rank, value, scale, precision});
           },
           nb::kw_only(), "heads"_a, "nope"_a, "rope"_a, "rank"_a, "value"_a, "scale"_a, "precision"_a = "exact")
      .def("project",
           [](WatchedLatent& self, const std::string& name, const mx::array& w, const std::optional<mx::array>& scales,
              const std::optional<mx::array>& biases, const std::optional<mx::array>& bias, int group_size, int bits,
              const std::string& mode) { self.latent.project(name, w, scales, biases, bias, group_size, bits, mode); },
           "name"_a, "w"_a, "scales"_a = nb::none(), "biases"_a = nb::none(), "bias"_a = nb::none(), "group_size"_a = 64,
           "bits"_a = 4, "mode"_a = "affine")
      .def("norm", [](WatchedLatent& self, const std::string& name, const mx::array& weight,
                      float eps) { self.latent.norm(name, weight, eps); },
           "name"_a, "weight"_a, "eps"_a)
      .def("rope",
           [](WatchedLatent& self, int dims, bool interleaved, std::optional<float> base,
              const std::optional<mx::array>& freqs, float scale,
              float multiplier) { self.latent.rope(dims, interleaved, base, freqs, scale, multiplier); },
           "dims"_a, "interleaved"_a, "base"_a = nb::none(), "freqs"_a = nb::none(), "scale"_a = 1.0f,
           "multiplier"_a = 1.0f)
      .def("finish", [](WatchedLatent& self, bool whole) { self.latent.finish(whole); }, "whole"_a = false)
      .def_prop_ro("whole", [](const WatchedLatent& self) { return self.latent.is_whole(); },
                   "Whether layer() can be called: the projections are known.")
      .def("watch", &WatchedLatent::watch, "owner"_a.none(), "key"_a, "value"_a,
           "Apply only while owner[key] is value; without an owner, the called module's.")
      .def("applies", &WatchedLatent::applies, "module"_a, "x"_a,
           "Whether module is as it was, and x float32 and not being differentiated.")
      .def("attend",
           [](const WatchedLatent& self, const mx::array& q_nope, const mx::array& q_pe, const mx::array& latent,
              const mx::array& k_pe, const std::optional<mx::array>& mask,
              bool causal, int bits,
              int group) { return self.latent.attend(q_nope, q_pe, latent, k_pe, mask, causal, {bits, group}); },
           "q_nope"_a, "q_pe"_a, "latent"_a, "k_pe"_a, "mask"_a = nb::none(), "causal"_a = false, "bits"_a = 0,
           "group"_a = 0,
           "[B, L, H * value] of queries [B, H, L, nope] and [B, H, L, rope] over latents [B, 1, S, rank] and keys; bits and "
           "group are those of packed latents.")
      .def("layer",
           [](const WatchedLatent& self, const mx::array& x, const mx::array& latent, const mx::array& k_pe, int offset,
              const std::optional<mx::array>& mask) -> nb::object {
             auto done = self.latent.layer(x, latent, k_pe, offset, mask);
             return done ? nb::cast(*done) : nb::none();
           },
           "x"_a, "latent"_a, "k_pe"_a, "offset"_a, "mask"_a = nb::none(),
           "The layer's result, latents and keys; None where the operation does not apply. Without a mask it is causal.");
}

} // namespace edger1
