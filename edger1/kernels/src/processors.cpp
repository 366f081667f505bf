#include "processors.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <string>
#include <thread>

namespace edger1 {
namespace {

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// The quota of a container, in whole cores rounded up; 0 without one.
int cgroup_quota_cores() {
  std::string line = read_line("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  if (std::sscanf(line.c_str(), "%lf %lf", &quota, &period) == 2 && quota > 0 && period > 0) {
    return static_cast<int>((quota + period - 1) / period);
  }
  return 0;
}

int physical_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) {
    return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  }
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (CPU_ISSET(cpu, &allowed)) {
      std::string siblings =
          read_line("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
      cores.insert(siblings.empty() ? "cpu" + std::to_string(cpu) : siblings);
    }
  }
  int found = std::max(1, static_cast<int>(cores.size()));
  int quota = cgroup_quota_cores();
  return quota > 0 ? std::min(found, quota) : found;
}

} // namespace

int threads_at_start() {
  if (const char* wanted = std::getenv("EDGER1_THREADS")) {
    char* end = nullptr;
    long n = std::strtol(wanted, &end, 10);
    if (end != wanted && *end == '\0' && n >= 1 && n <= kMostThreads) {
      return static_cast<int>(n);
    }
  }
  return physical_cores();
}

} // namespace edger1
