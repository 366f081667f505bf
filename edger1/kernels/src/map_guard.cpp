#include "map_guard.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <stdexcept>

namespace edger1 {
namespace {

// What a signal handler may look at: no locks, no allocation.
struct Range {
  std::atomic<uintptr_t> begin{0}, end{0};
  std::atomic<bool> broken{false};
};

constexpr int kMost = 512; // a model of 500 files is larger than any there is
Range ranges[kMost];
std::mutex changing; // of who takes which range
struct sigaction before;
uintptr_t page_bytes = 4096;

void pass_on(int signal, siginfo_t* info, void* context) {
  if (before.sa_flags & SA_SIGINFO) {
    before.sa_sigaction(signal, info, context);
  } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
    // The access is tried again and ends the process, as it would have.
    ::signal(signal, SIG_DFL);
  } else {
    before.sa_handler(signal);
  }
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (Range& range : ranges) {
    if (address < range.begin.load(std::memory_order_acquire) || address >= range.end.load(std::memory_order_acquire)) {
      continue;
    }
    void* page = reinterpret_cast<void*>(address / page_bytes * page_bytes);
    if (mmap(page, page_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) {
      break;
    }
    range.broken.store(true, std::memory_order_release);
    return;
  }
  pass_on(signal, info, context);
}

void install_handler() {
  static bool installed = false;
  if (installed) {
    return;
  }
  page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  struct sigaction action = {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGBUS, &action, &before) != 0) {
    throw std::runtime_error("the system takes no handler for SIGBUS");
  }
  installed = true;
}

} // namespace

MapGuard::MapGuard(const void* begin, size_t bytes) : slot_(-1) {
  std::lock_guard lock(changing);
  install_handler();
  for (int i = 0; i < kMost; i++) {
    if (ranges[i].end.load(std::memory_order_relaxed) == 0) {
      ranges[i].broken.store(false, std::memory_order_relaxed);
      ranges[i].begin.store(reinterpret_cast<uintptr_t>(begin), std::memory_order_release);
      ranges[i].end.store(reinterpret_cast<uintptr_t>(begin) + bytes, std::memory_order_release);
      slot_ = i;
      return;
    }
  }
  throw std::runtime_error("512 maps are guarded already");
}

MapGuard::~MapGuard() {
  std::lock_guard lock(changing);
  ranges[slot_].end.store(0, std::memory_order_release);
  ranges[slot_].begin.store(0, std::memory_order_release);
}

bool MapGuard::broken() const {
  return ranges[slot_].broken.load(std::memory_order_acquire);
}

} // namespace edger1
