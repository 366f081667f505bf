#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "bindings.h"
#include "experts.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edger1 {
namespace {

// Buffers that stay exported, and therefore where they are, as long as this lives.
//
// The last to hold it may be a queued operation, and then it goes on MLX's thread. Giving a buffer back needs the
// interpreter's lock, and that thread must not wait for it: who holds it may be waiting for that very thread. So the
// interpreter is asked to do it when it comes to it, on its main thread.
class Views {
 public:
  Views() = default;
  Views(const Views&) = delete;
  Views& operator=(const Views&) = delete;

  ~Views() {
    if (!Py_IsInitialized()) {
      return;
    }
    {
      std::lock_guard lock(left_mutex);
      left.insert(left.end(), views_.begin(), views_.end());
    }
    if (PyGILState_Check()) {
      give_back(nullptr);
    } else {
      // Where too many other calls are pending, the next who holds the lock does it.
      Py_AddPendingCall(give_back, nullptr);
    }
  }

  Bytes add(nb::handle buffer) {
    Py_buffer view;
    if (PyObject_GetBuffer(buffer.ptr(), &view, PyBUF_SIMPLE) != 0) {
      throw nb::python_error();
    }
    views_.push_back(view);
    return {view.buf, view.len};
  }

 private:
  static int give_back(void*) {
    std::vector<Py_buffer> views;
    {
      std::lock_guard lock(left_mutex);
      views.swap(left);
    }
    for (Py_buffer& view : views) {
      PyBuffer_Release(&view);
    }
    return 0;
  }

  static inline std::mutex left_mutex;
  static inline std::vector<Py_buffer> left; // what nobody reads any more and is still exported

  std::vector<Py_buffer> views_;
};

// Experts together with the Python objects they were made from, which may be exchanged behind their back.
class WatchedExperts {
 public:
  explicit WatchedExperts(const ExpertsSettings& settings) : experts(settings) {}

  // The experts stand for `owner[key]` being `value`. Without an owner the module passed to a call is meant: holding that
  // one would be a cycle that is never collected.
  void watch(nb::object owner, nb::object key, nb::object value) {
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

  Experts experts;

 private:
  struct Watched {
    nb::object owner, key, value;
  };
  std::vector<Watched> watched_;
};

std::vector<Bytes> bytes_of(Views& views, const std::vector<nb::object>& buffers) {
  std::vector<Bytes> found;
  for (const nb::object& buffer : buffers) {
    found.push_back(views.add(buffer));
  }
  return found;
}

// Arrivals as Python holds them. An operation holds the inner one: what it lets go of at last, on MLX's thread, must be no
// Python object.
struct SharedArrivals {
  explicit SharedArrivals(int64_t slots) : held(std::make_shared<Arrivals>(slots)) {}
  SharedArrivals(const SharedArrivals&) = delete;
  SharedArrivals& operator=(const SharedArrivals&) = delete;
  // Nobody is left who could tell a waiting operation.
  ~SharedArrivals() {
    held->abort();
  }

  std::shared_ptr<Arrivals> held;
};

std::shared_ptr<Arrivals> inner(const SharedArrivals* arrivals) {
  return arrivals ? arrivals->held : nullptr;
}

template <class T>
nb::object or_none(std::optional<T>&& value) {
  return value ? nb::cast(std::move(*value)) : nb::none();
}

using Array = std::optional<mx::array>;

} // namespace

void bind_experts(nb::module_& m) {
  nb::class_<SharedArrivals>(m, "Arrivals", "Which slots of a bank have been read; the rest an operation waits for.")
      .def(nb::init<int64_t>(), "slots"_a)
      .def("expect", [](SharedArrivals& self, const std::vector<int64_t>& slots) { self.held->expect(slots); }, "slots"_a,
           "Say that these slots will be overwritten: an operation waits for them.")
      .def("done", [](SharedArrivals& self, int64_t slot) { self.held->done(slot); }, "slot"_a,
           "Say that a slot holds what was expected. From any thread.")
      .def("fail", [](SharedArrivals& self, int64_t slot) { self.held->fail(slot); }, "slot"_a,
           "Say that a slot will not be filled: an operation that needs it gives NaN at once. From any thread.")
      .def("abort", [](SharedArrivals& self) { self.held->abort(); },
           "End all waiting until reset: an operation that misses a slot gives NaN. From any thread.")
      .def("reset", [](SharedArrivals& self) { self.held->reset(); }, "All slots have arrived, none has failed.")
      .def("failed", [](const SharedArrivals& self) { return self.held->failed(); }, "The slots that failed.")
      .def_prop_ro("slots", [](const SharedArrivals& self) { return self.held->slots(); })
      .def_prop_ro("aborted", [](const SharedArrivals& self) { return self.held->aborted(); })
      .def_prop_ro("waited_s", [](const SharedArrivals& self) { return self.held->waited_s(); },
                   "Seconds that operations have waited so far.");
  nb::class_<WatchedExperts>(m, "Experts", "The routed experts of a layer as one operation.")
      .def("__init__",
           [](WatchedExperts* self, const std::string& activation, float alpha, float limit, const std::string& precision) {
             new (self) WatchedExperts({activation, alpha, limit, precision});
           },
           nb::kw_only(), "activation"_a = "swiglu", "alpha"_a = 1.702f, "limit"_a = 7.0f, "precision"_a = "exact")
      .def("project",
           [](WatchedExperts& self, const std::string& name, const mx::array& w, const Array& scales, const Array& biases,
              const Array& bias, int group_size, int bits, const std::string& mode, bool in_place) {
             Quantization q{group_size, bits, mode};
             bool stacked = name == "gate" || name == "up" || name == "down";
             stacked ? self.experts.project(name, w, scales, biases, bias, q, in_place)
                     : self.experts.project_dense(name, w, scales, biases, bias, q);
           },
           "name"_a, "w"_a, "scales"_a = nb::none(), "biases"_a = nb::none(), "bias"_a = nb::none(), "group_size"_a = 64,
           "bits"_a = 4, "mode"_a = "affine", "in_place"_a = false,
           "gate, up, down: w [experts, n, k], overwritten in place if it says so; router, shared_gate, shared_up, shared_down, "
           "shared_weight: w [n, k].")
      .def("project_mapped",
           [](WatchedExperts& self, const std::string& name, int n, int k, mx::Dtype dtype,
              const std::vector<nb::object>& codes, const std::vector<nb::object>& scales,
              const std::vector<nb::object>& biases, const Array& bias, std::optional<int> group_size,
              std::optional<int> bits, const std::string& mode) {
             std::optional<Quantization> q;
             if (bits && group_size) {
               q = Quantization{*group_size, *bits, mode};
             }
             auto views = std::make_shared<Views>();
             auto all_codes = bytes_of(*views, codes), all_scales = bytes_of(*views, scales);
             self.experts.project_mapped(name, n, k, dtype, all_codes, all_scales, bytes_of(*views, biases), bias, q, views);
           },
           "name"_a, "n"_a, "k"_a, "dtype"_a, "codes"_a, "scales"_a = nb::list(), "biases"_a = nb::list(),
           "bias"_a = nb::none(), "group_size"_a = nb::none(), "bits"_a = nb::none(), "mode"_a = "affine",
           "gate, up or down where expert e lies in the buffers codes[e], scales[e], biases[e] (a memory map's slices, say).")
      .def("append_mapped",
           [](WatchedExperts& self, const std::string& name, const std::vector<nb::object>& codes,
              const std::vector<nb::object>& scales, const std::vector<nb::object>& biases,
              const std::vector<nb::object>& bias) {
             auto views = std::make_shared<Views>();
             auto all_codes = bytes_of(*views, codes), all_scales = bytes_of(*views, scales),
                  all_biases = bytes_of(*views, biases);
             self.experts.append_mapped(name, all_codes, all_scales, all_biases, bytes_of(*views, bias), views);
           },
           "name"_a, "codes"_a, "scales"_a = nb::list(), "biases"_a = nb::list(), "bias"_a = nb::list(),
           "Further experts behind those of gate, up or down, in buffers as with project_mapped and in the same types.")
      .def("router",
           [](WatchedExperts& self, int ranks, const std::string& score, const std::string& group_score, int groups,
              int groups_kept, bool softmax_chosen, bool normalize, float epsilon, float scale, const Array& correction) {
             self.experts.router({ranks, score, group_score, groups, groups_kept, softmax_chosen, normalize, epsilon, scale},
                                 correction);
           },
           nb::kw_only(), "ranks"_a, "score"_a = "softmax", "group_score"_a = "none", "groups"_a = 1, "groups_kept"_a = 1,
           "softmax_chosen"_a = false, "normalize"_a = false, "epsilon"_a = 0.0f, "scale"_a = 1.0f,
           "correction"_a = nb::none())
      .def("finish", [](WatchedExperts& self) { self.experts.finish(); })
      .def("watch", &WatchedExperts::watch, "owner"_a.none(), "key"_a, "value"_a,
           "Apply only while owner[key] is value; without an owner, the called module's.")
      .def("unchanged", &WatchedExperts::unchanged, "module"_a, "Whether all that is watched is as it was.")
      .def("__call__",
           [](const WatchedExperts& self, const mx::array& x, const mx::array& indices, const Array& weights,
              const SharedArrivals* arrivals) { return or_none(self.experts(x, indices, weights, inner(arrivals))); },
           "x"_a, "indices"_a, "weights"_a = nb::none(), "arrivals"_a = nb::none(),
           "The weighted sum over ranks, or each rank's result; None where the operation does not apply.")
      .def("given",
           [](const WatchedExperts& self, const mx::array& x, const mx::array& slots, const mx::array& weights,
              const SharedArrivals* arrivals) { return or_none(self.experts.given(x, slots, weights, inner(arrivals))); },
           "x"_a, "slots"_a, "weights"_a, "arrivals"_a = nb::none(),
           "What layer() computes after routing, the shared expert included; None where that does not apply.")
      .def("summed",
           [](const WatchedExperts& self, const mx::array& x, const mx::array& ranks, const mx::array& weights) {
             return or_none(self.experts.summed(x, ranks, weights));
           },
           "x"_a, "ranks"_a, "weights"_a,
           "What given() answers, from what each rank's expert gave; None where that does not apply.")
      .def("layer", [](const WatchedExperts& self, const mx::array& x) { return or_none(self.experts.layer(x)); }, "x"_a,
           "Router, experts and shared expert; None where that does not apply.")
      .def("routed", [](const WatchedExperts& self, const mx::array& x) { return or_none(self.experts.routed(x)); }, "x"_a,
           "Router and experts; None where that does not apply.")
      .def("route", [](const WatchedExperts& self, const mx::array& x) { return or_none(self.experts.route(x)); }, "x"_a,
           "The experts and weights that the router gives; None where that does not apply.")
      .def_prop_ro("experts", [](const WatchedExperts& self) { return self.experts.plan().experts; },
                   "How many places of experts there are, the appended ones among them.")
      .def_prop_ro("has_shared", [](const WatchedExperts& self) { return self.experts.plan().shared.present(); });
}

} // namespace edger1
