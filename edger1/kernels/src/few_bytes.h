// Words of fewer bytes than a register holds. Anonymous namespace, as everything compiled once an instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

namespace edger1 {
namespace {

// The first Count <= 8 bytes of p, little-endian, and nothing behind them; in registers throughout, since a load that
// is wider than the stores before it would wait for them.
template <int Count>
inline uint64_t load_bytes(const uint8_t* p) {
  constexpr int head = Count >= 8 ? 8 : Count >= 4 ? 4 : Count >= 2 ? 2 : 1;
  using Wide = std::conditional_t<head == 8, uint64_t, uint32_t>;
  using Narrow = std::conditional_t<head == 2, uint16_t, uint8_t>;
  std::conditional_t<head >= 4, Wide, Narrow> value;
  __builtin_memcpy(&value, p, head);
  if constexpr (Count > head) {
    return value | load_bytes<Count - head>(p + head) << (8 * head);
  } else {
    return value;
  }
}

} // namespace
} // namespace edger1
