// What each instruction set offers to drawing a token from a row of scores the length of a vocabulary: plain functions on
// pointers, without threads or MLX.
#pragma once

#include <cstdint>

#include "cpu_features.h"

namespace edger1 {

// Sums of exponentials of the scores within each of `kLevels` distances of the largest, and how many there are.
constexpr int kLevels = 4;
struct Masses {
  float mass[kLevels];
  int64_t count[kLevels];
  float total;
};

struct ChooseOps {
  // out = x - shift
  void (*subtract)(float* out, const float* x, float shift, int64_t n);
  // Writes e^x to `e` and sums it up.
  Masses (*masses)(float* e, const float* x, int64_t n, float top, const float* distances);
  // Indices of elements that are at least `limit`, in order; returns their number. `out` has room for n.
  int64_t (*at_least)(uint32_t* out, const float* x, int64_t n, float limit);
  int64_t (*count_at_least)(const float* x, int64_t n, float limit);
  // Values above `limit` (or equal to it, where `equal`) from x[*begin] on, appended to out[size] until it holds more
  // than room - 16 of them or x ends; moves *begin and returns the new size.
  int64_t (*gather_above)(float* out, int64_t size, int64_t room, const float* x, int64_t* begin, int64_t n,
                          float limit, bool equal);
  // Writes e^(x * factor - shift) and returns the sum.
  float (*exponentials)(float* out, const float* x, int64_t n, float factor, float shift);
};

extern const ChooseOps choose_portable;
extern const ChooseOps choose_avx2;
extern const ChooseOps choose_avx512vnni;
extern const ChooseOps choose_neon;

// The table of the instruction set in use.
const ChooseOps& choose_ops();

} // namespace edger1
