#include <nanobind/stl/optional.h>

#include <algorithm>

#include "bind_watched.h"
#include "bindings.h"
#include "decoder_stack.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"

namespace edger1 {
namespace {

using namespace nb::literals;

// The layers of a Python module `model`, as one operation that reads and writes mlx-lm's caches.
class WatchedStack {
 public:
  // `layers` are the modules, `calls` what stands for each.
  WatchedStack(nb::list layers, nb::list calls, const std::optional<mx::array>& norm, float eps, nb::type_object plain,
               nb::type_object batched, nb::object packed, nb::object packed_batched)
      : stack_(layers_of(calls), norm, eps), held_calls_(std::move(calls)), plain_(std::move(plain)),
        batched_(std::move(batched)), packed_(std::move(packed)),
        packed_batched_(std::move(packed_batched)) {
    if (nb::len(layers) != nb::len(held_calls_)) {
      throw std::invalid_argument("decoder stack: it takes one call for each layer");
    }
    for (nb::handle call : held_calls_) {
      calls_.push_back(nb::cast<const WatchedLayer*>(call));
    }
    for (nb::handle layer : layers) {
      modules_.push_back(nb::borrow(layer));
      types_.push_back(nb::borrow(reinterpret_cast<PyObject*>(Py_TYPE(layer.ptr()))));
    }
  }

  void watch(nb::object owner, nb::object key, nb::object value) {
    watches_.add(std::move(owner), std::move(key), std::move(value));
  }

  // The result, the caches having been given their new arrays; None, and nothing done, where the operation does not apply.
  nb::object call(nb::handle model, const mx::array& x, nb::list layers, nb::sequence caches) {
    auto taken = take(model, x, layers, caches);
    if (!taken) {
      return nb::none();
    }
    auto& [each, before, padding, place] = *taken;
    auto done = stack_(x, before);
    if (!done) {
      return nb::none();
    }
    int length = x.shape(1);
    std::optional<mx::array> offset;
    if (padding) {
      offset = mx::add(padding->offset, mx::array(length, mx::int32));
    }
    for (size_t i = 0; i < each.size(); i++) {
      nb::setattr(each[i], "keys", nb::cast(std::move(done->keys[i])));
      nb::setattr(each[i], "values", nb::cast(std::move(done->values[i])));
      nb::setattr(each[i], place, nb::int_(before.offsets[i] + length));
      if (padding) {
        // An object for each cache, since mlx-lm changes them in place, but one array: see padding_of.
        nb::setattr(each[i], "offset", nb::cast(*offset));
        nb::setattr(each[i], "left_padding", nb::cast(padding->left));
      }
    }
    return nb::cast(done->out);
  }

  // Whether a call would give a result, were there room in the caches.
  bool applies(nb::handle model, const mx::array& x, nb::list layers, nb::sequence caches) const {
    auto taken = take(model, x, layers, caches);
    return taken && stack_.applies(x, taken->before);
  }

 private:
  struct Padding {
    mx::array left, offset;
  };

  struct Taken {
    std::vector<nb::object> each;
    StackCaches before;
    std::optional<Padding> padding;  // of batched caches
    const char* place;               // the attribute that says how much they hold
  };

  // What the caches hold, if they are of one known kind and neither layers nor weights have been exchanged.
  std::optional<Taken> take(nb::handle model, const mx::array& x, nb::list layers, nb::sequence caches) const {
    if (x.ndim() != 3 || !unchanged(model, layers) || nb::len(caches) != modules_.size()) {
      return std::nullopt;
    }
    Taken taken;
    for (nb::handle cache : caches) {
      taken.each.push_back(nb::borrow(cache));
    }
    nb::handle kind = plain_;
    for (const nb::object* known : {&batched_, &packed_, &packed_batched_}) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(taken.each[0].ptr())) == known->ptr()) {
        kind = *known;
      }
    }
    bool batched = kind.is(batched_) || kind.is(packed_batched_), packed = kind.is(packed_) || kind.is(packed_batched_);
    if (packed) {
      taken.before.format = format_of(taken.each[0]);
    }
    taken.place = batched ? "_idx" : "offset";
    for (const auto& cache : taken.each) {
      if (Py_TYPE(cache.ptr()) != reinterpret_cast<PyTypeObject*>(kind.ptr())) {
        return std::nullopt;
      }
      if (packed && format_of(cache) != taken.before.format) {
        return std::nullopt;
      }
      nb::object keys = cache.attr("keys"), values = cache.attr("values");
      if (keys.is_none() || values.is_none()) {
        return std::nullopt;
      }
      taken.before.keys.push_back(nb::cast<mx::array>(keys));
      taken.before.values.push_back(nb::cast<mx::array>(values));
      taken.before.offsets.push_back(nb::cast<int>(cache.attr(taken.place)));
    }
    if (batched) {
      taken.padding = padding_of(taken.each);
      if (!taken.padding) {
        return std::nullopt;
      }
      taken.before.starts = taken.padding->left;
      taken.before.after.push_back(taken.padding->offset);
    }
    return taken;
  }

  static RowFormat format_of(nb::handle cache) {
    return {nb::cast<int>(cache.attr("bits")), nb::cast<int>(cache.attr("group_size"))};
  }

  static std::vector<const DecoderLayer*> layers_of(const nb::list& calls) {
    std::vector<const DecoderLayer*> layers;
    for (nb::handle call : calls) {
      layers.push_back(&nb::cast<const WatchedLayer*>(call)->layer);
    }
    return layers;
  }

  bool unchanged(nb::handle model, nb::list layers) const {
    if (!watches_.unchanged(model) || nb::len(layers) != modules_.size()) {
      return false;
    }
    for (size_t i = 0; i < modules_.size(); i++) {
      PyObject* layer = PyList_GET_ITEM(layers.ptr(), static_cast<Py_ssize_t>(i));
      if (layer != modules_[i].ptr() || reinterpret_cast<PyObject*>(Py_TYPE(layer)) != types_[i].ptr() ||
          !calls_[i]->watches.unchanged(layer)) {
        return false;
      }
    }
    return true;
  }

  // What mlx-lm's batched caches know of their sequences, if it is the same in every layer. Looking is a synchronisation, so
  // they are given the same arrays, by which it shows the next time.
  static std::optional<Padding> padding_of(const std::vector<nb::object>& caches) {
    std::optional<Padding> first;
    for (const auto& cache : caches) {
      if (!cache.attr("_right_padding").is_none()) {
        return std::nullopt;
      }
      auto left = nb::cast<mx::array>(cache.attr("left_padding")), offset = nb::cast<mx::array>(cache.attr("offset"));
      if (!first) {
        if (left.dtype() != mx::int32 || offset.dtype() != mx::int32 || left.is_tracer() || offset.is_tracer()) {
          return std::nullopt;
        }
        first = Padding{left, offset};
        continue;
      }
      if (left.id() != first->left.id() && !same(left, first->left)) {
        return std::nullopt;
      }
      if (offset.id() != first->offset.id() && !same(offset, first->offset)) {
        return std::nullopt;
      }
    }
    return first;
  }

  static bool same(const mx::array& a, const mx::array& b) {
    nb::gil_scoped_release release;
    return a.shape() == b.shape() && a.dtype() == b.dtype() && mx::array_equal(a, b).item<bool>();
  }

  DecoderStack stack_;
  nb::list held_calls_;
  std::vector<const WatchedLayer*> calls_;
  nb::object plain_, batched_, packed_, packed_batched_;
  std::vector<nb::object> modules_, types_;
  Watches watches_;
};

} // namespace

void bind_stack(nb::module_& m) {
  nb::class_<WatchedStack>(m, "DecoderStack", "All decoder layers of a model and its last norm as one operation.")
      .def(nb::init<nb::list, nb::list, const std::optional<mx::array>&, float, nb::type_object, nb::type_object,
                    nb::object, nb::object>(),
           "layers"_a, "calls"_a, "norm"_a.none(), "eps"_a, "plain_cache"_a, "batched_cache"_a,
           "packed_cache"_a = nb::none(), "packed_batched_cache"_a = nb::none())
      .def("watch", &WatchedStack::watch, "owner"_a.none(), "key"_a, "value"_a,
           "Apply only while owner[key] is value; without an owner, the called model's.")
      .def("__call__", &WatchedStack::call, "model"_a, "x"_a, "layers"_a, "caches"_a,
           "The result, the caches having been given their new arrays; None where the operation does not apply.")
      .def("applies", &WatchedStack::applies, "model"_a, "x"_a, "layers"_a, "caches"_a,
           "Whether a call would give a result, were there room in the caches.");
}

} // namespace edger1
