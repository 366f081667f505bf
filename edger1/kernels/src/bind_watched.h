// A decoder layer together with the Python objects it was made from, for the bindings.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <utility>
#include <vector>

#include "decoder.h"
#include "prefill.h"

namespace edger1 {

namespace nb = nanobind;

// Python objects that something was made from, which may be exchanged behind its back.
class Watches {
 public:
  // `owner[key]` is to be `value`. Without an owner the module passed to unchanged is meant: holding that one would be a
  // cycle that is never collected.
  void add(nb::object owner, nb::object key, nb::object value) {
    watched_.push_back({std::move(owner), std::move(key), std::move(value)});
  }

  bool unchanged(nb::handle module) const {
    for (const auto& w : watched_) {
      PyObject* owner = w.owner.is_none() ? module.ptr() : w.owner.ptr();
      if (PyDict_GetItem(owner, w.key.ptr()) != w.value.ptr()) {
        return false;
      }
    }
    return true;
  }

 private:
  struct Watched {
    nb::object owner, key, value;
  };
  std::vector<Watched> watched_;
};

// A decoder layer that stands for a Python module while what it was made from is in place.
class WatchedLayer {
 public:
  explicit WatchedLayer(const DecoderSettings& settings) : layer(settings) {}

  void watch(nb::object owner, nb::object key, nb::object value) {
    watches.add(std::move(owner), std::move(key), std::move(value));
  }

  // None where the layer does not apply; see DecoderLayer.
  nb::object call(nb::handle module, const mx::array& x, nb::handle mask, const std::optional<mx::array>& keys,
                  const std::optional<mx::array>& values, int offset, int first_slot, std::optional<int> count,
                  const std::optional<mx::array>& starts, int bits, int group) const {
    bool causal = mask.is_none() ? x.ndim() == 3 && x.shape(1) == 1
                                 : PyUnicode_Check(mask.ptr()) && PyUnicode_CompareWithASCIIString(mask.ptr(), "causal") == 0;
    std::optional<mx::array> rows_see;
    if (!causal && nb::isinstance<mx::array>(mask)) {
      rows_see = nb::cast<mx::array>(mask);
    }
    if (!keys || !values || (!causal && !rows_see) || !watches.unchanged(module)) {
      return nb::none();
    }
    auto done = layer(x, *keys, *values, {offset, first_slot, count, starts, {bits, group}}, rows_see);
    if (!done) {
      return nb::none();
    }
    return done->normed ? nb::cast(std::tuple(done->out, done->keys, done->values, *done->normed))
                        : nb::cast(std::tuple(done->out, done->keys, done->values));
  }

  // Many rows at once; see prefill_layer. None where that does not apply.
  nb::object prefill(nb::handle module, const mx::array& x, const std::optional<mx::array>& keys,
                     const std::optional<mx::array>& values, int offset, int capacity) const {
    auto done = watches.unchanged(module) ? prefill_layer(layer.plan(), x, keys, values, offset, capacity) : std::nullopt;
    return done ? nb::cast(*done) : nb::none();
  }

  DecoderLayer layer;
  Watches watches;
};

} // namespace edger1
