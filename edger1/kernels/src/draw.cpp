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

struct Job {
  const float* scores;
  int64_t n;
  DrawSettings settings;
  uint64_t key;
};

uint32_t draw_from(const Job& job) {
  const auto& [x, n, settings, key] = job;
  const ChooseOps& choose = choose_ops();
  auto* logs = static_cast<float*>(thread_scratch(1, static_cast<size_t>(n) * 3 * sizeof(float)));
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

class DrawToken : public DensePrimitive {
 public:
  DrawToken(mx::Stream s, uint64_t key, DrawSettings settings) : DensePrimitive(s), key_(key), settings_(settings) {}

  const char* name() const override {
    return "EdgeR1DrawToken";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& that = static_cast<const DrawToken&>(other);
    return key_ == that.key_ && settings_ == that.settings_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>&) override {
    return {{1}};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>&) override {
    throw std::invalid_argument("drawing a token has no derivative and takes one row at a time");
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    Rows scores(inputs[0]);
    auto* out = outputs[0].data<uint32_t>();
    launch(stream(), [=, key = key_, settings = settings_] {
      std::vector<float> plain(scores.step == 1 ? 0 : static_cast<size_t>(scores.n));
      *out = draw_from({scores.fetch(0, plain.data()), scores.n, settings, key});
    });
  }

 private:
  uint64_t key_;
  DrawSettings settings_;
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
      for (int token : tokens) {
        out[token] = out[token] < 0 ? out[token] * penalty : out[token] / penalty;
      }
    });
  }

 private:
  std::vector<int> tokens_;
  float penalty_;
};

void check_row(const char* what, const mx::array& scores) {
  if (scores.ndim() != 2 || scores.shape(0) != 1 || scores.shape(1) < 1 || scores.dtype() != mx::float32) {
    throw std::invalid_argument(std::string(what) + " takes one row of float32 scores, [1, vocabulary]");
  }
}

} // namespace

mx::array penalized(const mx::array& scores, const std::vector<int>& tokens, float penalty, mx::StreamOrDevice s) {
  mx::Stream stream = cpu_stream(s, "penalized");
  check_row("penalized", scores);
  // Each token once, however often it was said.
  std::vector<int> once = tokens;
  std::sort(once.begin(), once.end());
  once.erase(std::unique(once.begin(), once.end()), once.end());
  if (!once.empty() && (once.front() < 0 || once.back() >= scores.shape(1))) {
    throw std::invalid_argument("penalized takes tokens of the vocabulary, got " +
                                std::to_string(once.front() < 0 ? once.front() : once.back()) + " of " +
                                std::to_string(scores.shape(1)));
  }
  return mx::array(scores.shape(), mx::float32, std::make_shared<Penalized>(stream, std::move(once), penalty), {scores});
}

std::pair<uint64_t, uint64_t> split_key(uint64_t key) {
  auto [a, c] = threefry(key, 0, 2);
  auto [b, d] = threefry(key, 1, 3);
  return {uint64_t{a} << 32 | b, uint64_t{c} << 32 | d};
}

mx::array draw_token(const mx::array& scores, uint64_t key, const DrawSettings& settings, mx::StreamOrDevice s) {
  mx::Stream stream = cpu_stream(s, "draw_token");
  check_row("draw_token", scores);
  if (!(settings.inverse_temperature > 0) || !(settings.top_p >= 0 && settings.top_p <= 1) ||
      !(settings.min_p >= 0 && settings.min_p <= 1) || settings.top_k < 0) {
    throw std::invalid_argument("draw_token takes a positive temperature, top_p and min_p from 0 to 1, and top_k from 0");
  }
  return mx::array({1}, mx::uint32, std::make_shared<DrawToken>(stream, key, settings), {scores});
}

} // namespace edger1
