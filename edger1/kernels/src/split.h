// How a phase of a course (pool.h) is split among threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pool.h"

namespace edger1 {

// A phase's items split into pieces: one for each thread, together most of them, and then ever shorter ones for whoever is
// first, so that all threads end together. Long pieces read memory best, and a thread's own one is known beforehand.
struct Split {
  static constexpr int kMost = 512;
  int n = -1, least = 0, threads = 0, pieces = 0;
  int bounds[kMost + 1];

  void set(int n_, int least_) {
    int threads_ = pool_threads();
    if (n == n_ && least == least_ && threads == threads_) {
      return;
    }
    n = n_, least = least_, threads = threads_, pieces = 0;
    int own = std::max(static_cast<int>(int64_t{n} * 3 / (4 * threads)), least);
    bounds[0] = 0;
    for (; pieces < threads; pieces++) {
      bounds[pieces + 1] = std::min(bounds[pieces] + own, n);
    }
    while (bounds[pieces] < n) {
      int left = n - bounds[pieces];
      int size = pieces + 1 == kMost ? left : std::clamp(left / (2 * threads), std::min(least, left), left);
      bounds[pieces + 1] = bounds[pieces] + size;
      pieces++;
    }
  }
};

} // namespace edger1
