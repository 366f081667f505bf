#include <nanobind/stl/optional.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "bindings.h"
#include "cache_rooms.h"
#include "map_guard.h"
#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/memory.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edger1 {
namespace {

#if !defined(MADV_COLLAPSE)
constexpr int MADV_COLLAPSE = 25; // Linux 6.1
#endif
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

void need_evaluated(const mlx::core::array& a, const char* who) {
  if (a.status() == mlx::core::array::Status::unscheduled) {
    throw std::invalid_argument(std::string(who) + " needs an evaluated array");
  }
}

// Memory on huge pages that arrays too small for pages of their own share.
class Arena {
 public:
  explicit Arena(int64_t bytes) : buffer_({}, mlx::core::uint8, nullptr, {}) {
    if (bytes < 1 || bytes > (int64_t{1} << 30)) {
      throw std::invalid_argument("an arena has 1 byte to 1 GiB, not " + std::to_string(bytes));
    }
    // Room for padding between arrays, and whole pages where it comes to one.
    bytes_ = bytes + bytes / 64 + 4096;
    if (bytes_ > static_cast<int64_t>(kHugePage)) {
      bytes_ = (bytes_ + static_cast<int64_t>(kHugePage) - 1) / static_cast<int64_t>(kHugePage) * static_cast<int64_t>(kHugePage);
    }
    size_t all = static_cast<size_t>(bytes_) + kHugePage;
    buffer_ = mlx::core::array(mlx::core::allocator::malloc(all), {static_cast<int>(all)}, mlx::core::uint8);
    auto begin = reinterpret_cast<uintptr_t>(buffer_.data<char>());
    first_ = static_cast<int64_t>((begin + kHugePage - 1) / kHugePage * kHugePage - begin);
    // Before anything is written: pages are then huge from the beginning.
    madvise(buffer_.data<char>() + first_, static_cast<size_t>(bytes_), MADV_HUGEPAGE);
  }

  // A copy of an evaluated array in here; nothing where it does not fit any more.
  std::optional<mlx::core::array> place(mlx::core::array& a) {
    need_evaluated(a, "an arena");
    a.wait();
    auto size = static_cast<int64_t>(a.nbytes());
    if (!a.flags().row_contiguous || size == 0 || used_ + size > bytes_) {
      return std::nullopt;
    }
    mlx::core::array placed(a.shape(), a.dtype(), nullptr, {});
    // MLX counts offsets in elements, whose size divides what malloc aligns to.
    placed.copy_shared_buffer(buffer_, a.strides(), a.flags(), a.size(),
                              (first_ + used_) / static_cast<int64_t>(a.itemsize()));
    placed.set_status(mlx::core::array::Status::available);
    std::memcpy(placed.data<char>(), a.data<char>(), static_cast<size_t>(size));
    used_ += (size + kLine - 1) / kLine * kLine;
    return placed;
  }

 private:
  static constexpr int64_t kLine = 64;
  mlx::core::array buffer_;
  int64_t bytes_ = 0, first_ = 0, used_ = 0;
};

// The whole huge pages that lie inside an evaluated array, moved there now; those the system refuses stay as they are.
int64_t collapse_pages(mlx::core::array& a) {
  need_evaluated(a, "collapse_pages");
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

// A guard over the memory of a Python buffer, a memory map that is.
class GuardedBuffer {
 public:
  explicit GuardedBuffer(nb::handle buffer) {
    if (PyObject_GetBuffer(buffer.ptr(), &view_, PyBUF_SIMPLE) != 0) {
      throw nb::python_error();
    }
    try {
      guard_.emplace(view_.buf, static_cast<size_t>(view_.len));
    } catch (...) {
      PyBuffer_Release(&view_);
      throw;
    }
  }
  ~GuardedBuffer() {
    guard_.reset();
    PyBuffer_Release(&view_);
  }
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  bool broken() const {
    return guard_->broken();
  }

 private:
  Py_buffer view_{};
  std::optional<MapGuard> guard_;
};

} // namespace

void bind_pages(nb::module_& m) {
  // MLX waits for the streams of all threads here. Its own bindings keep the interpreter's lock meanwhile, and who is to
  // bring what a stream waits for may need that.
  m.def("clear_cache", &mlx::core::clear_cache, nb::call_guard<nb::gil_scoped_release>(),
        "mx.clear_cache, while other threads of Python run.");
  m.def("set_cache_limit", &mlx::core::set_cache_limit, "limit"_a, nb::call_guard<nb::gil_scoped_release>(),
        "mx.set_cache_limit, while other threads of Python run.");
  nb::class_<GuardedBuffer>(m, "MapGuard",
                            "While this lives, reading a map whose file was cut short gives zeros, and not SIGBUS.")
      .def("__init__", [](GuardedBuffer* self, nb::object map) { new (self) GuardedBuffer(map); }, "map"_a)
      .def_prop_ro("broken", &GuardedBuffer::broken, "Whether that has happened: what was computed since is wrong.");
  nb::class_<Arena>(m, "Arena", "Memory on huge pages that small arrays share.")
      .def(nb::init<int64_t>(), "bytes"_a)
      .def("place", &Arena::place, "array"_a, nb::call_guard<nb::gil_scoped_release>(),
           "A copy of an evaluated array in the arena; None where it does not fit any more.");
  nb::class_<CacheRooms>(m, "CacheRooms", "Memory on huge pages for caches, which are written in place there.")
      .def(nb::init<>())
      .def(
          "hold",
          [](CacheRooms& rooms, const mlx::core::array& a, int used, int capacity, mlx::core::Dtype dtype) {
            need_evaluated(a, "hold");
            note_use();
            nb::gil_scoped_release released;
            return rooms.hold(a, used, capacity, dtype);
          },
          "array"_a, "used"_a, "capacity"_a, "dtype"_a,
          "An evaluated array [..., n, width] with `capacity` rows: the first `used` as `dtype`, then zeros; or None.");
  m.def("cache_room_bytes", &cache_room_bytes, "Memory that rooms for caches hold, those included that wait for use.");
  m.def("keep_spare_rooms", &keep_spare_rooms, "most_bytes"_a,
        "Let rooms that wait for use take so much at most, and never above 64 MB; what is above that is given back.");
  m.def("collapse_pages", &collapse_pages, "array"_a, nb::call_guard<nb::gil_scoped_release>(),
        "Move an array's memory to huge pages where the system allows it; returns the bytes that lie in them.");
}

} // namespace edger1
