#include "bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <vector>

#include "cpu_features.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// Runs a job that counts how often each chunk ran and, in `nested`, starts another job in every chunk.
std::vector<int> count_chunks(int64_t n_chunks, int64_t work, bool nested) {
  edger1::note_use();
  std::vector<std::atomic<int>> counts(static_cast<size_t>(n_chunks));
  edger1::parallel_for(n_chunks, [&](int64_t chunk) {
    std::atomic<int64_t> inner{0};
    auto spin = [&](int64_t) { inner.fetch_add(1, std::memory_order_relaxed); };
    if (nested) {
      edger1::parallel_for(work, spin);
    } else {
      for (int64_t i = 0; i < work; i++) {
        spin(i);
      }
    }
    counts[static_cast<size_t>(chunk)] += inner.load() == work ? 1 : 1000;
  });
  return {counts.begin(), counts.end()};
}

} // namespace

NB_MODULE(_ext, m) {
  nb::module_::import_("mlx.core");
  m.doc() = "EdgeR1's CPU kernels as MLX primitives.";
  m.attr("built_for_mlx") = EDGER1_MLX_VERSION;
  m.def("instruction_sets", &edger1::instruction_sets,
        "Instruction sets that this processor offers, in rising order of preference.");
  m.def("active_instruction_set", &edger1::active_isa_name, "The instruction set in use; EDGER1_ISA chooses another.");
  m.def("threads", &edger1::pool_threads, "Threads that one operation uses at most.");
  m.def("set_threads", &edger1::set_pool_threads, "n"_a, "Change threads() from the next operation on.");
  m.def("_count_chunks", &count_chunks, "n_chunks"_a, "work"_a = 1, "nested"_a = false,
        nb::call_guard<nb::gil_scoped_release>(), "For tests of the pool: how often each chunk of a job ran.");
  edger1::bind_qmm(m);
  edger1::bind_pages(m);
#if defined(EDGER1_HAS_OPS)
  edger1::bind_ops(m);
  edger1::bind_decoder(m);
  edger1::bind_stack(m);
  edger1::bind_experts(m);
  edger1::bind_latent(m);
  edger1::bind_choose(m);
  edger1::bind_train(m);
#endif
}
