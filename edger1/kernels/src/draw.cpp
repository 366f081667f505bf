#include "draw.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "choose_ops.h"

namespace edger1 {

const ChooseOps& choose_ops() {
#if defined(__x86_64__)
  static const ChooseOps& table =
      table_for_isa<ChooseOps>(&choose_portable, &choose_avx2, &choose_avx512vnni, nullptr);
#elif defined(__aarch64__)
  static const ChooseOps& table = table_for_isa<ChooseOps>(&choose_portable, nullptr, nullptr, &choose_neon);
#else
  static const ChooseOps& table = choose_portable;
#endif
  return table;
}

namespace {

constexpr float kAll = -std::numeric_limits<float>::infinity();
// Distances from the largest log-probability within which the kept ones are looked for, one after another.
constexpr float kDistances[kLevels] = {3.0f, 6.0f, 10.0f, 20.0f};

// The smallest log-probability that top-p keeps: going down from the largest, one is kept while those above it have
// together less than `top_p` of the whole. Those equal to it are kept too. `e` and `where` are scratch for n elements.
float top_p_limit(const float* x, int64_t n, float top, float top_p, float* e, uint32_t* where) {
  Masses masses = choose_ops().masses(e, x, n, top, kDistances);
  double target = static_cast<double>(top_p) * masses.total;
  int level = 0;
  while (level < kLevels && masses.mass[level] < target) {
    level++;
  }
  float distance = kDistances[std::min(level, kLevels - 1)];
  int64_t size = choose_ops().at_least(where, x, n, level < kLevels ? top - distance : kAll);
  // By slices of log-probability first: only the slice in which the target is reached needs to be in order.
  constexpr int kSlices = 256;
  auto slice = [&](uint32_t i) { return static_cast<int>(std::min((top - x[i]) * (kSlices / distance), kSlices - 1.0f)); };
  double mass[kSlices] = {};
  for (int64_t i = 0; i < size; i++) {
    mass[slice(where[i])] += e[where[i]];
  }
  double above = 0;
  int last = 0;
  while (last + 1 < kSlices && above + mass[last] < target) {
    above += mass[last++];
  }
  auto end = std::remove_if(where, where + size, [&](uint32_t i) { return slice(i) != last; });
  std::sort(where, end, [&](uint32_t a, uint32_t b) { return x[a] > x[b]; });
  float limit = kAll;
  for (uint32_t* i = where; i != end && above < target; i++) {
    above += e[*i];
    limit = x[*i];
  }
  // Rounding may put the target beyond the slice that it was found in; then the whole slice is kept.
  return limit == kAll ? top - distance * (static_cast<float>(last) / kSlices) : limit;
}

// The k-th largest of those x that are at least `limit`, or `limit` where there are fewer.
float kth_largest(const float* x, int64_t n, int64_t k, float limit) {
  int64_t room = std::max<int64_t>(4 * k, 4096);
  std::vector<float> best(static_cast<size_t>(room + 16));
  int64_t begin = 0, size = 0;
  bool equal = true;
  while (true) {
    size = choose_ops().gather_above(best.data(), size, room, x, &begin, n, limit, equal);
    if (size >= k) {
      std::nth_element(best.begin(), best.begin() + (k - 1), best.begin() + size, std::greater<>());
      limit = best[static_cast<size_t>(k - 1)];
      equal = false;
      size = k;
    }
    if (begin >= n) {
      return limit;
    }
  }
}

uint32_t rotated(uint32_t x, int by) {
  return x << by | x >> (32 - by);
}

// Threefry 2x32 with 20 rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3; 2011), MLX's generator.
std::pair<uint32_t, uint32_t> threefry(uint64_t key, uint32_t a, uint32_t b) {
  uint32_t high = static_cast<uint32_t>(key >> 32), low = static_cast<uint32_t>(key);
  const uint32_t keys[3] = {high, low, high ^ low ^ 0x1bd11bdau};
  const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  a += keys[0];
  b += keys[1];
  for (uint32_t i = 0; i < 5; i++) {
    for (int by : rotations[i % 2]) {
      a += b;
      b = rotated(b, by) ^ a;
    }
    a += keys[(i + 1) % 3];
    b += keys[(i + 2) % 3] + i + 1;
  }
  return {a, b};
}

// mx.random.uniform of one number.
float uniform(uint64_t key) {
  return std::min(static_cast<float>(threefry(key, 0, 0).first) * 0x1p-32f, 0x1.fffffep-1f);
}

// Divides what is positive by the penalty and multiplies what is not, once for each of `tokens`, and for `last` where it is
// a token and not among them. Tokens are in ascending order.
void penalize(float* scores, int64_t n, const std::vector<int>& tokens, int64_t last, float penalty) {
  auto discourage = [&](int64_t token) {
    scores[token] = scores[token] < 0 ? scores[token] * penalty : scores[token] / penalty;
  };
  for (int token : tokens) {
    discourage(token);
  }
  if (last >= 0 && last < n && !std::binary_search(tokens.begin(), tokens.end(), static_cast<int>(last))) {
    discourage(last);
  }
}

uint32_t draw_from(const float* x, int64_t n, const DrawSettings& settings, uint64_t key) {
  const ChooseOps& choose = choose_ops();
  auto* logs = static_cast<float*>(thread_scratch(0, static_cast<size_t>(n) * 3 * sizeof(float)));
  float* e = logs + n;
  auto* where = reinterpret_cast<uint32_t*>(e + n);
  choose.subtract(logs, x, ops().log_sum_exp(x, static_cast<int>(n)), n);
  float top = logs[ops().argmax(logs, n)], limit = kAll;
  bool top_p = settings.top_p > 0 && settings.top_p < 1;
  // Without a finite largest one there is no distribution; the first element is drawn then, as MLX's argmax does.
  if (std::isfinite(top)) {
    if (top_p) {
      limit = top_p_limit(logs, n, top, settings.top_p, e, where);
    }
    if (settings.min_p > 0) {
      limit = std::max(limit, top + static_cast<float>(std::log(static_cast<double>(settings.min_p))));
    }
    if (settings.top_k > 0 && settings.top_k < n) {
      limit = kth_largest(logs, n, settings.top_k, limit);
      int64_t surplus = choose.count_at_least(logs, n, limit) - settings.top_k;
      // Of several equal to the smallest, the first ones stay.
      for (int64_t i = n - 1; surplus > 0; i--) {
        if (logs[i] == limit) {
          logs[i] = kAll;
          surplus--;
        }
      }
    }
  }
  // As MLX: the first element at which the sum of probabilities so far passes one random number. MLX adds up in float, so
  // where tens of thousands of tokens have a share its sum is off by some of them; this one is not.
  const float* chosen = logs;
  int64_t size = n;
  if (limit != kAll) {
    size = choose.at_least(where, logs, n, limit);
    for (int64_t i = 0; i < size; i++) {
      e[i] = logs[where[i]];
    }
    chosen = e;
  }
  float factor = settings.inverse_temperature;
  double total = choose.exponentials(e, chosen, size, factor, top * factor), sum = 0;
  double random = uniform(key) * total;
  int64_t found = 0;
  for (int64_t i = 0; i < size && sum <= random; i++) {
    if (e[i] > 0) {
      sum += e[i];
      // Where rounding keeps the sum below the number, the last possible one is drawn.
      found = i;
    }
  }
  return limit == kAll ? static_cast<uint32_t>(found) : where[found];
}

// Inputs: scores, and the tokens before where some are penalized.
class DrawTokens : public DensePrimitive {
 public:
  DrawTokens(mx::Stream s, std::vector<Draw> draws) : DensePrimitive(s), draws_(std::move(draws)) {}

  const char* name() const override {
    return "EdgeR1DrawTokens";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return draws_ == static_cast<const DrawTokens&>(other).draws_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>&) override {
    return {{static_cast<int>(draws_.size())}};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>&) override {
    throw std::invalid_argument("drawing tokens has no derivative and takes rows of one axis");
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    Rows scores(inputs[0]);
    const uint32_t* last = inputs.size() > 1 ? inputs[1].data<uint32_t>() : nullptr;
    int64_t last_stride = last ? inputs[1].strides(0) : 0;
    auto* out = outputs[0].data<uint32_t>();
    launch(stream(), [=, draws = draws_] {
      parallel_for(static_cast<int64_t>(draws.size()), [&](int64_t row) {
        const Draw& draw = draws[static_cast<size_t>(row)];
        std::vector<float> own;
        if (scores.step != 1 || draw.penalty != 1) {
          own.resize(static_cast<size_t>(scores.n));
        }
        const float* x = scores.fetch(row, own.data());
        if (draw.penalty != 1) {
          if (x != own.data()) {
            std::copy_n(x, scores.n, own.data());
            x = own.data();
          }
          penalize(own.data(), scores.n, draw.tokens, last ? int64_t{last[row * last_stride]} : -1, draw.penalty);
        }
        out[row] = draw.settings.inverse_temperature == 0 ? static_cast<uint32_t>(ops().argmax(x, scores.n))
                                                          : draw_from(x, scores.n, draw.settings, draw.key);
      });
    });
  }

 private:
  std::vector<Draw> draws_;
};

class Penalized : public DensePrimitive {
 public:
  Penalized(mx::Stream s, std::vector<int> tokens, float penalty)
      : DensePrimitive(s), tokens_(std::move(tokens)), penalty_(penalty) {}

  const char* name() const override {
    return "EdgeR1Penalized";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& that = static_cast<const Penalized&>(other);
    return tokens_ == that.tokens_ && penalty_ == that.penalty_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>&) override {
    throw std::invalid_argument("a penalty on tokens has no derivative and takes one row at a time");
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    Rows scores(inputs[0]);
    auto* out = outputs[0].data<float>();
    launch(stream(), [scores, out, tokens = tokens_, penalty = penalty_] {
      const float* from = scores.fetch(0, out);
      if (from != out) {
        std::copy_n(from, scores.n, out);
      }
      penalize(out, scores.n, tokens, -1, penalty);
    });
  }

 private:
  std::vector<int> tokens_;
  float penalty_;
};

void check_rows(const char* what, const mx::array& scores, int rows) {
  if (scores.ndim() != 2 || scores.shape(0) != rows || scores.shape(1) < 1 || scores.dtype() != mx::float32) {
    throw std::invalid_argument(std::string(what) + " takes float32 scores, [" + std::to_string(rows) + ", vocabulary]");
  }
}

// Each token once, however often it was said, in ascending order.
std::vector<int> each_once(const char* what, std::vector<int> tokens, int vocabulary) {
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  if (!tokens.empty() && (tokens.front() < 0 || tokens.back() >= vocabulary)) {
    throw std::invalid_argument(std::string(what) + " takes tokens of the vocabulary, got " +
                                std::to_string(tokens.front() < 0 ? tokens.front() : tokens.back()) + " of " +
                                std::to_string(vocabulary));
  }
  return tokens;
}

} // namespace

mx::array penalized(const mx::array& scores, const std::vector<int>& tokens, float penalty, mx::StreamOrDevice s) {
  mx::Stream stream = cpu_stream(s, "penalized");
  check_rows("penalized", scores, 1);
  auto once = each_once("penalized", tokens, scores.shape(1));
  return mx::array(scores.shape(), mx::float32, std::make_shared<Penalized>(stream, std::move(once), penalty), {scores});
}

std::pair<uint64_t, uint64_t> split_key(uint64_t key) {
  auto [a, c] = threefry(key, 0, 2);
  auto [b, d] = threefry(key, 1, 3);
  return {uint64_t{a} << 32 | b, uint64_t{c} << 32 | d};
}

mx::array draw_token(const mx::array& scores, uint64_t key, const DrawSettings& settings, mx::StreamOrDevice s) {
  if (!(settings.inverse_temperature > 0)) {
    throw std::invalid_argument("draw_token takes a positive temperature");
  }
  check_rows("draw_token", scores, 1);
  return draw_tokens(scores, {{key, settings, 1.0f, {}}}, std::nullopt, s);
}

mx::array draw_tokens(const mx::array& scores, std::vector<Draw> draws, const std::optional<mx::array>& last,
                      mx::StreamOrDevice s) {
  mx::Stream stream = cpu_stream(s, "draw_tokens");
  int rows = static_cast<int>(draws.size());
  check_rows("draw_tokens", scores, rows);
  for (Draw& draw : draws) {
    const DrawSettings& kept = draw.settings;
    if (!(kept.inverse_temperature >= 0) || !(kept.top_p >= 0 && kept.top_p <= 1) ||
        !(kept.min_p >= 0 && kept.min_p <= 1) || kept.top_k < 0 || !(draw.penalty > 0)) {
      throw std::invalid_argument(
          "draw_tokens takes temperatures and penalties that are positive, top_p and min_p from 0 to 1, and top_k from 0");
    }
    draw.tokens = each_once("draw_tokens", std::move(draw.tokens), scores.shape(1));
  }
  std::vector<mx::array> inputs{scores};
  if (last) {
    if (last->shape() != mx::Shape{rows} || last->dtype() != mx::uint32) {
      throw std::invalid_argument("draw_tokens takes a token before, uint32, for each row");
    }
    inputs.push_back(*last);
  }
  return mx::array({rows}, mx::uint32, std::make_shared<DrawTokens>(stream, std::move(draws)), std::move(inputs));
}

} // namespace edger1
