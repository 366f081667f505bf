// How many threads a process should compute with.
#pragma once

namespace edger1 {

constexpr int kMostThreads = 256;

// EDGER1_THREADS, if that is a number from 1 to kMostThreads, else the physical cores that this process may run on: its
// affinity mask and cgroup quota count.
int threads_at_start();

} // namespace edger1
