// Drawing a token from scores: filters and the choice in one operation.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "ops_common.h"

namespace edger1 {

// What is kept before drawing, in the order in which mlx-lm's sampler applies it; the neutral values keep everything.
struct DrawSettings {
  float inverse_temperature;
  float top_p;    // 0 or 1: off
  float min_p;    // 0: off
  int top_k;      // 0: off
  bool operator==(const DrawSettings&) const = default;
};

// How one row is drawn. An inverse temperature of 0 stands for a temperature of 0: the largest score, no random number.
struct Draw {
  uint64_t key;
  DrawSettings settings;
  float penalty;            // discourages `tokens` first, as `penalized` does; 1: off
  std::vector<int> tokens;
  bool operator==(const Draw&) const = default;
};

// The two keys that mx.random.split gives for the key high << 32 | low: what the next draws use, and what this one uses.
std::pair<uint64_t, uint64_t> split_key(uint64_t key);

// Scores [1, V] (float32, CPU) with each of `tokens` discouraged: divided by `penalty` where positive, else multiplied by it.
// Throws std::invalid_argument for other scores and for a token beyond them.
mx::array penalized(const mx::array& scores, const std::vector<int>& tokens, float penalty, mx::StreamOrDevice s = {});

// Draws one index (uint32, [1]) from one row of scores [1, V], float32 on the CPU: log-softmax, the filters, then
// mx.random.categorical's random number for `key`. Throws std::invalid_argument for other arguments.
mx::array draw_token(const mx::array& scores, uint64_t key, const DrawSettings& settings, mx::StreamOrDevice s = {});

// Draws one index (uint32, [B]) from each row of scores [B, V], each as it would be drawn alone. `last` (uint32, [B]) are
// further tokens to be discouraged, one a row, which may not be known yet when the graph is built.
mx::array draw_tokens(const mx::array& scores, std::vector<Draw> draws, const std::optional<mx::array>& last = std::nullopt,
                      mx::StreamOrDevice s = {});

} // namespace edger1
