#include "cpu_features.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace edger1 {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found{"portable"};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.emplace_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) {
      found.emplace_back("avx512vnni");
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

Isa choose() {
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
  return name == "avx512vnni" ? Isa::avx512vnni
      : name == "avx2"        ? Isa::avx2
      : name == "portable"    ? Isa::portable
                              : Isa::neon;
}

} // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* active_isa_name() {
  switch (active_isa()) {
    case Isa::avx512vnni:
      return "avx512vnni";
    case Isa::avx2:
      return "avx2";
    case Isa::neon:
      return "neon-dotprod";
    case Isa::portable:
      break;
  }
  return "portable";
}

} // namespace edger1
