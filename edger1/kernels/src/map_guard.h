// A memory map whose file is cut short while it is being read: the pages that are gone read as zeros, and the map says so.
//
// Without it the process would be killed (SIGBUS). Whoever computes on a map asks `broken` before using the result.
#pragma once

#include <cstddef>

namespace edger1 {

class MapGuard {
 public:
  // Throws std::runtime_error where too many maps are guarded already, or the system takes no handler.
  MapGuard(const void* begin, size_t bytes);
  ~MapGuard();
  MapGuard(const MapGuard&) = delete;
  MapGuard& operator=(const MapGuard&) = delete;

  bool broken() const;

 private:
  int slot_;
};

} // namespace edger1
