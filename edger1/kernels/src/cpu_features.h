// Which instruction sets this processor and operating system offer, asked once at run time.
#pragma once

#include <string>
#include <vector>

namespace edger1 {

enum class Isa { portable, avx2, avx512vnni, neon };

// Names in rising order of preference: "portable", "avx2", "avxvnni", "avx512vnni", "avx512bf16", "amx", or "portable",
// "neon-dotprod".
// "avx512vnni" stands for F, BW, DQ, VL, VNNI and VBMI together: every desktop and laptop processor with VNNI has them.
// "avxvnni" is AVX2 with the integer dot product that most Intel processors since 2021 have; active_isa() is avx2 then.
// "avx512bf16" is "avx512vnni" with products of bf16 in vectors, "amx" those and matrix tiles for bf16, where the system lets a process use them.
std::vector<std::string> instruction_sets();

// What the kernels use: the best of the above, or EDGER1_ISA. Throws std::invalid_argument where that names a set which
// this processor or build does not have.
Isa active_isa();
const char* active_isa_name();

// Whether matrix tiles are to be used; active_isa() is avx512vnni then.
bool active_isa_has_amx();

// Whether products of bf16 in vectors are to be used; active_isa() is avx512vnni then.
bool active_isa_has_bf16();

// Whether AVX2 comes with an integer dot product; active_isa() is avx2 then.
bool active_isa_has_avx_vnni();

// One table of function pointers for each instruction set that this build has, by name: table_for(portable, avx2, ...).
template <class Table>
const Table& table_for_isa(const Table* portable, const Table* avx2, const Table* avx512vnni, const Table* neon) {
  const Table* found = nullptr;
  switch (active_isa()) {
    case Isa::avx512vnni:
      found = avx512vnni;
      break;
    case Isa::avx2:
      found = avx2;
      break;
    case Isa::neon:
      found = neon;
      break;
    case Isa::portable:
      break;
  }
  return found ? *found : *portable;
}

} // namespace edger1
