#include "cpu_features.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace edger1 {
namespace {

#if defined(__x86_64__)
bool has_avx_vnni() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}

// Tiles are state that Linux saves only for processes that asked for it.
bool amx_allowed() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx >> 22 & 1) || !(edx >> 24 & 1) ||
      !__builtin_cpu_supports("avx512bf16")) {
    return false;
  }
  constexpr int request_permission = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

} // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found{"portable"};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.emplace_back("avx2");
    if (has_avx_vnni()) {
      found.emplace_back("avxvnni");
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) {
      found.emplace_back("avx512vnni");
      if (__builtin_cpu_supports("avx512bf16")) {
        found.emplace_back("avx512bf16");
      }
      static const bool amx = amx_allowed();
      if (amx) {
        found.emplace_back("amx");
      }
    }
  }
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
    found.emplace_back("neon-dotprod");
  }
#endif
  return found;
}

namespace {

std::string choose() {
  std::vector<std::string> offered = instruction_sets();
  std::string name = offered.back();
  if (const char* wanted = std::getenv("EDGER1_ISA"); wanted && *wanted) {
    name = wanted;
    bool known = false;
    std::string list;
    for (const auto& one : offered) {
      known |= one == name;
      list += (list.empty() ? "" : ", ") + one;
    }
    if (!known) {
      throw std::invalid_argument("EDGER1_ISA=" + name + " is not available here; this processor offers " + list);
    }
  }
  return name;
}

const std::string& chosen() {
  static const std::string name = choose();
  return name;
}

} // namespace

Isa active_isa() {
  static const Isa isa = chosen() == "portable" ? Isa::portable
      : chosen() == "avx2" || active_isa_has_avx_vnni() ? Isa::avx2
      : chosen() == "neon-dotprod"              ? Isa::neon
                                                : Isa::avx512vnni;
  return isa;
}

const char* active_isa_name() {
  return chosen().c_str();
}

bool active_isa_has_amx() {
  static const bool amx = chosen() == "amx";
  return amx;
}

bool active_isa_has_bf16() {
  static const bool bf16 = chosen() == "avx512bf16" || chosen() == "amx";
  return bf16;
}

bool active_isa_has_avx_vnni() {
  static const bool vnni = chosen() == "avxvnni";
  return vnni;
}

} // namespace edger1
