#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>

#include "bindings.h"
#include "mlx/array.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edger1 {
namespace {

#if !defined(MADV_COLLAPSE)
constexpr int MADV_COLLAPSE = 25; // Linux 6.1
#endif
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// The whole huge pages that lie inside an evaluated array, moved there now; those the system refuses stay as they are.
int64_t collapse_pages(mlx::core::array& a) {
  if (a.status() == mlx::core::array::Status::unscheduled) {
    throw std::invalid_argument("collapse_pages needs an evaluated array");
  }
  if (a.nbytes() == 0 || !a.flags().contiguous) {
    return 0;
  }
  a.wait();
  auto begin = (reinterpret_cast<uintptr_t>(a.data<char>()) + kHugePage - 1) / kHugePage * kHugePage;
  auto end = (reinterpret_cast<uintptr_t>(a.data<char>()) + a.data_size() * a.itemsize()) / kHugePage * kHugePage;
  if (end <= begin || madvise(reinterpret_cast<void*>(begin), end - begin, MADV_COLLAPSE) != 0) {
    return 0;
  }
  return static_cast<int64_t>(end - begin);
}

} // namespace

void bind_pages(nb::module_& m) {
  m.def("collapse_pages", &collapse_pages, "array"_a, nb::call_guard<nb::gil_scoped_release>(),
        "Move an array's memory to huge pages where the system allows it; returns the bytes that lie in them.");
}

} // namespace edger1
