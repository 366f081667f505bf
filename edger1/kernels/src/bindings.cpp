#include "bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <stdexcept>
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

// How often each piece of each phase ran; nothing if a phase began before the one before it was complete.
std::vector<std::vector<int>> count_course(int phases, int64_t shared, int work, int failing) {
  struct Counting : edger1::Course {
    std::vector<std::vector<std::atomic<int>>> ran;
    int64_t shared;
    int work, failing, phase = -1;
    bool complete = true;
    int64_t next() override {
      for (size_t i = 0; phase >= 0 && i < ran[phase].size(); i++) {
        complete = complete && ran[phase][i].load(std::memory_order_relaxed) == 1;
      }
      if (++phase == static_cast<int>(ran.size())) {
        return 0;
      }
      int64_t n = edger1::pool_threads() + shared * (phase % 2);
      ran[phase] = std::vector<std::atomic<int>>(static_cast<size_t>(n));
      return n;
    }
    void piece(int64_t i) override {
      volatile int spent = 0;
      for (int turn = 0; turn < work; turn++) {
        spent = spent + turn;
      }
      ran[phase][static_cast<size_t>(i)].fetch_add(1, std::memory_order_relaxed);
      if (phase == failing) {
        throw std::runtime_error("a piece of the course failed");
      }
    }
  } course;
  course.ran.resize(static_cast<size_t>(phases));
  course.shared = shared;
  course.work = work;
  course.failing = failing;
  edger1::note_use();
  edger1::run_course(course);
  std::vector<std::vector<int>> found;
  for (auto& phase : course.ran) {
    found.emplace_back(phase.begin(), phase.end());
  }
  if (!course.complete) {
    found.clear();
  }
  return found;
}

} // namespace

NB_MODULE(_ext, m) {
  nb::module_::import_("mlx.core");
  m.doc() = "EdgeR1's CPU kernels as MLX primitives.";
  m.attr("built_for_mlx") = EDGER1_MLX_VERSION;
  m.def("instruction_sets", &edger1::instruction_sets,
        "Instruction sets that this processor offers, in rising order of preference.");
  m.def("scratch_bytes", &edger1::scratch_bytes, "Memory that the kernels' threads keep to compute in.");
  m.def("active_instruction_set", &edger1::active_isa_name, "The instruction set in use; EDGER1_ISA chooses another.");
  m.def("threads", &edger1::pool_threads, "Threads that one operation uses at most.");
  m.def("set_threads", &edger1::set_pool_threads, "n"_a, "Change threads() from the next operation on.");
  m.def("_count_chunks", &count_chunks, "n_chunks"_a, "work"_a = 1, "nested"_a = false,
        nb::call_guard<nb::gil_scoped_release>(), "For tests of the pool: how often each chunk of a job ran.");
  m.def("_count_course", &count_course, "phases"_a, "shared"_a, "work"_a = 1, "failing"_a = -1,
        nb::call_guard<nb::gil_scoped_release>(), "For tests of the pool: how often each piece of each phase ran.");
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
