#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "experts_plan.h"
#include "few_rows.h"

namespace edger1 {

Projection ExpertProjection::operator[](int64_t expert) const {
  Projection p = form;
  const At& here = at[static_cast<size_t>(expert)];
  if (p.quantized) {
    p.w.codes = static_cast<const uint8_t*>(here.codes);
    p.w.scales = here.scales;
    p.w.biases = here.biases;
  } else {
    p.plain = here.codes;
  }
  return p;
}

void ExpertProjection::add_bias(int64_t expert, float* const* rows, int m, int n0, int n1) const {
  const void* bias = at[static_cast<size_t>(expert)].bias;
  if (!bias) {
    return;
  }
  constexpr int block = 256;
  float values[block];
  int step = bias_type == Float::f32 ? n1 - n0 : block;
  for (int n = n0; n < n1; n += step) {
    int count = std::min(step, n1 - n);
    const auto* from = static_cast<const float*>(offset(bias, bias_type, n));
    if (bias_type != Float::f32) {
      ops().to_f32(values, from, bias_type, count);
      from = values;
    }
    for (int i = 0; i < m; i++) {
      ops().blend_row(rows[i] + (n - n0), 1, from, 1, count);
    }
  }
}

bool is_gated(ExpertActivation activation) {
  return activation <= ExpertActivation::swiglu_capped;
}

void finish_plan(ExpertsPlan& plan) {
  plan.x_forms.clear();
  plan.inner_forms.clear();
  plan.shared_forms.clear();
  Projection* readers[] = {&plan.up.form, &plan.gate.form, &plan.router.gate, &plan.shared.gate, &plan.shared.up,
                           &plan.shared.weight};
  for (Projection* p : readers) {
    if (p->n > 0) {
      p->form = form_index(plan.x_forms, *p);
    }
  }
  plan.down.form.form = form_index(plan.inner_forms, plan.down.form);
  if (plan.shared.present()) {
    plan.shared.down.form = form_index(plan.shared_forms, plan.shared.down);
  }
}

namespace {

float clip(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;
}

void gated(Gate op, const ExpertsPlan& plan, float* h, const float* gate, const float* up, int64_t n) {
  ops().gate(op, h, gate, up, n, plan.alpha, plan.limit);
}

} // namespace

void activate(const ExpertsPlan& plan, ExpertActivation activation, float* h, const float* gate, const float* up,
              int64_t n) {
  float limit = plan.limit;
  switch (activation) {
    case ExpertActivation::swiglu:
      return gated(Gate::swiglu, plan, h, gate, up, n);
    case ExpertActivation::geglu:
      return gated(Gate::geglu, plan, h, gate, up, n);
    case ExpertActivation::geglu_tanh:
      return gated(Gate::geglu_tanh, plan, h, gate, up, n);
    case ExpertActivation::swiglu_oai:
      return gated(Gate::swiglu_oai, plan, h, gate, up, n);
    case ExpertActivation::swiglu_clipped:
    case ExpertActivation::swiglu_capped: {
      constexpr int64_t block = 256;
      float g[block], u[block];
      bool before = activation == ExpertActivation::swiglu_clipped;
      for (int64_t i = 0; i < n; i += block) {
        int64_t left = std::min(block, n - i);
        for (int64_t j = 0; j < left; j++) {
          g[j] = before && gate[i + j] > limit ? limit : gate[i + j];
          u[j] = clip(up[i + j], -limit, limit);
        }
        if (before) {
          ops().gate(Gate::swiglu, h + i, g, u, left, 0, 0);
          continue;
        }
        ops().unary(Unary::silu, g, g, left);
        for (int64_t j = 0; j < left; j++) {
          h[i + j] = (g[j] > limit ? limit : g[j]) * u[j];
        }
      }
      return;
    }
    case ExpertActivation::relu:
    case ExpertActivation::relu2:
      for (int64_t i = 0; i < n; i++) {
        float x = up[i] < 0 ? 0.0f : up[i];
        h[i] = activation == ExpertActivation::relu ? x : x * x;
      }
      return;
    case ExpertActivation::silu:
      return ops().unary(Unary::silu, h, up, n);
    case ExpertActivation::gelu:
      return ops().unary(Unary::gelu, h, up, n);
    case ExpertActivation::gelu_tanh:
      return ops().unary(Unary::gelu_tanh, h, up, n);
  }
}

void sum_ranks(float* out, const float* parts, int64_t stride, const float* weights, int ranks, int n) {
  std::memcpy(out, parts, static_cast<size_t>(n) * 4);
  ops().scale_row(out, weights[0], n);
  for (int r = 1; r < ranks; r++) {
    ops().blend_row(out, 1, parts + r * stride, weights[r], n);
  }
}

ExpertGroups group_by_expert(const ExpertsPlan& plan, const ExpertsCall& call) {
  ExpertGroups found;
  int64_t pairs = call.rows * call.ranks;
  std::vector<int64_t> end(static_cast<size_t>(plan.experts) + 1, 0);
  for (int64_t i = 0; i < pairs; i++) {
    if (call.experts[i] >= static_cast<uint32_t>(plan.experts)) {
      std::ostringstream text;
      text << "experts: index " << call.experts[i] << " where there are " << plan.experts << " experts";
      throw std::invalid_argument(text.str());
    }
    end[call.experts[i] + 1]++;
  }
  for (int64_t e = 0; e < plan.experts; e++) {
    int64_t count = end[e + 1];
    end[e + 1] += end[e];
    if (count > 0) {
      found.groups.push_back({e, end[e], end[e + 1]});
      found.largest = std::max(found.largest, count);
    }
  }
  found.pairs.resize(static_cast<size_t>(pairs));
  for (int64_t i = 0; i < pairs; i++) {
    found.pairs[static_cast<size_t>(end[call.experts[i]]++)] = i;
  }
  return found;
}

std::optional<GroupRange> ArrivingGroups::next() {
  auto& groups = groups_.groups;
  bool first = given_ == 0;
  size_t from = given_;
  if (from == groups.size()) {
    return std::nullopt;
  }
  if (!arrivals_) {
    given_ = groups.size();
    return GroupRange{from, given_};
  }
  for (;;) {
    std::vector<int64_t> missing;
    for (size_t g = from; g < groups.size(); g++) {
      auto state = arrivals_->state(groups[g].expert);
      if (state == Arrivals::State::failed) {
        throw NeverArrives();
      }
      if (state == Arrivals::State::arrived) {
        std::swap(groups[g], groups[given_++]);
      } else {
        missing.push_back(groups[g].expert);
      }
    }
    if (given_ > from || (first && std::exchange(at_once_, false))) {
      return GroupRange{from, given_};
    }
    if (!arrivals_->wait(missing)) {
      throw NeverArrives();
    }
  }
}

namespace {

// No expert has more than kMaxRows rows: its matrices are read once, row by row, and meet all of them.
class FewRows {
 public:
  // `waits`: that not all experts have arrived.
  FewRows(const ExpertsPlan& plan, const ExpertsCall& call, ExpertGroups groups, bool waits)
      : plan_(plan), call_(call), groups_(std::move(groups)), pairs_(call.rows * call.ranks), waits_(waits),
        x_(plan.x_forms, call.rows, plan.fast), inner_(plan.inner_forms, pairs_, plan.fast),
        shared_(plan.shared_forms, call.with_shared ? call.rows : 0, plan.fast) {
    shared_inner_ = call.with_shared ? plan.shared.down.k : 0;
    int64_t floats = pairs_ * plan.inner + call.rows * shared_inner_ + call.rows;
    int64_t part_floats = waits && call.weights ? (pairs_ + (call.with_shared ? call.rows : 0)) * plan.hidden : 0;
    if (part_floats > kMostParts) {
      part_floats = 0;
    }
    int64_t prepared = x_.bytes() + inner_.bytes() + shared_.bytes();
    auto* at = static_cast<char*>(thread_scratch(1, static_cast<size_t>(prepared + (floats + part_floats) * 4)));
    x_.place(at);
    inner_.place(at + x_.bytes());
    shared_.place(at + x_.bytes() + inner_.bytes());
    hidden_ = reinterpret_cast<float*>(at + prepared);
    shared_hidden_ = hidden_ + pairs_ * plan.inner;
    shared_weights_ = shared_hidden_ + call.rows * shared_inner_;
    parts_ = part_floats > 0 ? shared_weights_ + call.rows : call.weights ? nullptr : call.out;
  }

  void operator()() {
    x_.prepare_all(call_.x, call_.x_stride);
    if (waits_) {
      return as_they_arrive();
    }
    GroupRange all{0, groups_.groups.size()};
    into_hidden(all, call_.with_shared);
    inner_.prepare_all(hidden_, plan_.inner);
    if (call_.with_shared) {
      shared_.prepare_all(shared_hidden_, shared_inner_);
    }
    out_of_hidden();
  }

  // The sum of what each expert gave before, [rows, ranks, hidden], and of what the shared one gives now.
  void sum_given(const float* given) {
    if (call_.with_shared) {
      x_.prepare_all(call_.x, call_.x_stride);
      into_hidden({0, 0}, true);
      shared_.prepare_all(shared_hidden_, shared_inner_);
    }
    int64_t bytes = pairs_ * 4 + (call_.with_shared ? row_bytes(plan_.shared.down) : 0);
    sweep_rows(plan_.hidden, bytes, kLongest, [&](int64_t begin, int64_t end) {
      auto n0 = static_cast<int>(begin), n1 = static_cast<int>(end);
      float* shared = nullptr;
      if (call_.with_shared) {
        shared = static_cast<float*>(thread_scratch(0, size_t(call_.rows) * size_t(n1 - n0) * 4));
        shared_down(shared, n1 - n0, n0, n1);
      }
      sum(given + n0, plan_.hidden, shared, n1 - n0, n0, n1);
    });
  }

 private:
  static int64_t row_bytes(const Projection& p) {
    return p.n > 0 ? p.row_bytes() : 0;
  }

  // Each expert from x to its result as soon as it is there, the shared one first; the sum at the end.
  void as_they_arrive() {
    ArrivingGroups arriving(groups_, call_.arrivals, call_.with_shared);
    bool shared = call_.with_shared;
    while (auto range = arriving.next()) {
      into_hidden(*range, shared);
      prepare_inner(*range);
      if (shared) {
        shared_.prepare_all(shared_hidden_, shared_inner_);
      }
      if (parts_) {
        into_parts(*range, shared);
      }
      shared = false;
    }
    if (!call_.weights) {
      return;
    }
    parts_ ? sum_parts() : out_of_hidden();
  }

  void prepare_inner(GroupRange range) const {
    std::vector<int64_t> pairs;
    for (size_t g = range.first; g < range.last; g++) {
      const auto& group = groups_.groups[g];
      pairs.insert(pairs.end(), groups_.pairs.begin() + group.begin, groups_.pairs.begin() + group.end);
    }
    inner_.prepare_some(pairs, hidden_, plan_.inner);
  }

  // Rows of the experts' gates and ups one after the other, then those of the shared expert.
  void into_hidden(GroupRange range, bool with_shared) {
    auto experts = static_cast<int64_t>(range.last - range.first);
    int64_t inner = plan_.inner, bytes = row_bytes(plan_.gate.form) + row_bytes(plan_.up.form);
    sweep_rows(experts * inner + (with_shared ? shared_inner_ : 0), bytes, kLongest, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < std::min(end, experts * inner);) {
        int64_t g = n / inner, until = std::min(end, (g + 1) * inner);
        expert_hidden(groups_.groups[range.first + static_cast<size_t>(g)], static_cast<int>(n - g * inner),
                      static_cast<int>(until - g * inner));
        n = until;
      }
      int64_t first = experts * inner;
      if (end > first) {
        shared_hidden(static_cast<int>(std::max(begin, first) - first), static_cast<int>(end - first));
      }
    });
    if (with_shared && plan_.shared.weight.n > 0) {
      weigh_shared();
    }
  }

  // Rows n0..n1 of gate and up of one MLP, the shared one where `expert` is -1, for m rows of x: to[i] is where n0 of row i
  // goes.
  void gate_and_up(const Projection& gate, const Projection& up, int64_t expert, const int64_t* rows, int m, int n0,
                   int n1, float* const* to) const {
    bool routed = expert >= 0;
    int n = n1 - n0;
    auto* scratch = static_cast<float*>(thread_scratch(0, size_t(m) * size_t(n) * 4));
    float* gates[kMaxRows];
    for (int i = 0; i < m; i++) {
      gates[i] = scratch + int64_t{i} * n;
    }
    const void* x[kMaxRows];
    if (gate.n > 0) {
      for (int i = 0; i < m; i++) {
        x[i] = x_.row(gate.form, rows[i]);
      }
      multiply_rows(gate, plan_.fast, x, m, n0, n1, gates);
      if (routed) {
        plan_.gate.add_bias(expert, gates, m, n0, n1);
      }
    }
    for (int i = 0; i < m; i++) {
      x[i] = x_.row(up.form, rows[i]);
    }
    multiply_rows(up, plan_.fast, x, m, n0, n1, to);
    if (routed) {
      plan_.up.add_bias(expert, to, m, n0, n1);
    }
    for (int i = 0; i < m; i++) {
      activate(plan_, routed ? plan_.activation : plan_.shared.activation, to[i], gates[i], to[i], n);
    }
  }

  void expert_hidden(const ExpertGroups::Group& group, int n0, int n1) const {
    int m = static_cast<int>(group.end - group.begin);
    int64_t rows[kMaxRows];
    float* to[kMaxRows];
    for (int i = 0; i < m; i++) {
      int64_t pair = groups_.pairs[static_cast<size_t>(group.begin + i)];
      rows[i] = pair / call_.ranks;
      to[i] = hidden_ + pair * plan_.inner + n0;
    }
    Projection gate = plan_.gate.present() ? plan_.gate[group.expert] : Projection();
    gate_and_up(gate, plan_.up[group.expert], group.expert, rows, m, n0, n1, to);
  }

  void shared_hidden(int n0, int n1) const {
    int m = static_cast<int>(call_.rows);
    int64_t rows[kMaxRows];
    float* to[kMaxRows];
    for (int i = 0; i < m; i++) {
      rows[i] = i;
      to[i] = shared_hidden_ + i * shared_inner_ + n0;
    }
    gate_and_up(plan_.shared.gate, plan_.shared.up, -1, rows, m, n0, n1, to);
  }

  void weigh_shared() {
    const void* x[kMaxRows];
    float* to[kMaxRows];
    for (int64_t i = 0; i < call_.rows; i++) {
      x[i] = x_.row(plan_.shared.weight.form, i);
      to[i] = shared_weights_ + i;
    }
    multiply_rows(plan_.shared.weight, plan_.fast, x, static_cast<int>(call_.rows), 0, 1, to);
    ops().unary(Unary::sigmoid, shared_weights_, shared_weights_, call_.rows);
  }

  // A range of rows of every chosen expert's down, summed while it is at hand.
  void out_of_hidden() {
    auto experts = static_cast<int64_t>(groups_.groups.size());
    int64_t bytes = experts * row_bytes(plan_.down.form) + (call_.with_shared ? row_bytes(plan_.shared.down) : 0);
    int64_t longest = std::max<int64_t>(kPartFloats / std::max<int64_t>(pairs_, 1), 16);
    sweep_rows(plan_.hidden, bytes, longest,
               [&](int64_t begin, int64_t end) { down(static_cast<int>(begin), static_cast<int>(end)); });
  }

  void down(int n0, int n1) const {
    int n = n1 - n0;
    float* parts = call_.weights ? static_cast<float*>(thread_scratch(0, size_t(pairs_ + call_.rows) * size_t(n) * 4))
                                 : call_.out + n0;
    int64_t stride = call_.weights ? n : plan_.hidden;
    experts_down({0, groups_.groups.size()}, parts, stride, n0, n1);
    if (!call_.weights) {
      return;
    }
    if (call_.with_shared) {
      shared_down(parts + pairs_ * stride, stride, n0, n1);
    }
    sum(parts, stride, parts + pairs_ * stride, stride, n0, n1);
  }

  // The same, in two steps: what each expert of a range gives, and their sum.
  void into_parts(GroupRange range, bool with_shared) {
    auto experts = static_cast<int64_t>(range.last - range.first);
    int64_t bytes = experts * row_bytes(plan_.down.form) + (with_shared ? row_bytes(plan_.shared.down) : 0);
    int64_t stride = plan_.hidden;
    sweep_rows(plan_.hidden, bytes, plan_.hidden, [&](int64_t begin, int64_t end) {
      auto n0 = static_cast<int>(begin), n1 = static_cast<int>(end);
      experts_down(range, parts_ + n0, stride, n0, n1);
      if (with_shared) {
        shared_down(parts_ + pairs_ * stride + n0, stride, n0, n1);
      }
    });
  }
  void sum_parts() const {
    parallel_ranges(plan_.hidden, grain_for(plan_.hidden, double(pairs_ + call_.rows), 32768, 16), [&](int64_t begin, int64_t end) {
      const float* parts = parts_ + begin;
      sum(parts, plan_.hidden, parts + pairs_ * plan_.hidden, plan_.hidden, static_cast<int>(begin), static_cast<int>(end));
    });
  }

  // Rows n0..n1 of what each pair's expert gives: pair p's are at parts + p * stride.
  void experts_down(GroupRange range, float* parts, int64_t stride, int n0, int n1) const {
    for (size_t g = range.first; g < range.last; g++) {
      const auto& group = groups_.groups[g];
      const void* x[kMaxRows];
      float* to[kMaxRows];
      int m = static_cast<int>(group.end - group.begin);
      for (int i = 0; i < m; i++) {
        int64_t pair = groups_.pairs[static_cast<size_t>(group.begin + i)];
        x[i] = inner_.row(plan_.down.form.form, pair);
        to[i] = parts + pair * stride;
      }
      multiply_rows(plan_.down[group.expert], plan_.fast, x, m, n0, n1, to);
      plan_.down.add_bias(group.expert, to, m, n0, n1);
    }
  }

  void shared_down(float* parts, int64_t stride, int n0, int n1) const {
    int m = static_cast<int>(call_.rows);
    const void* x[kMaxRows];
    float* to[kMaxRows];
    for (int i = 0; i < m; i++) {
      x[i] = shared_.row(plan_.shared.down.form, i);
      to[i] = parts + int64_t{i} * stride;
    }
    multiply_rows(plan_.shared.down, plan_.fast, x, m, n0, n1, to);
  }

  // Rows n0..n1 of the result: the pairs' parts in order of rank, then the shared expert's.
  void sum(const float* parts, int64_t stride, const float* shared, int64_t shared_stride, int n0, int n1) const {
    int n = n1 - n0;
    for (int64_t t = 0; t < call_.rows; t++) {
      float* out = call_.out + t * plan_.hidden + n0;
      sum_ranks(out, parts + t * call_.ranks * stride, stride, call_.weights + t * call_.ranks, call_.ranks, n);
      if (call_.with_shared) {
        float weight = plan_.shared.weight.n > 0 ? shared_weights_[t] : 1.0f;
        ops().blend_row(out, 1, shared + t * shared_stride, weight, n);
      }
    }
  }

  static constexpr int64_t kLongest = 4096;         // rows of one range, for the scratch that it takes
  static constexpr int64_t kPartFloats = 128 << 10; // of a range of down, so that they stay in the cache
  static constexpr int64_t kMostParts = 4 << 20;    // of all experts' results; more are made after all have arrived

  const ExpertsPlan& plan_;
  const ExpertsCall& call_;
  ExpertGroups groups_;
  int64_t pairs_;
  bool waits_;
  PreparedRows x_, inner_, shared_;
  int64_t shared_inner_ = 0;
  float *hidden_ = nullptr, *shared_hidden_ = nullptr, *shared_weights_ = nullptr;
  float* parts_ = nullptr; // [pairs and shared rows, hidden], if results are kept until all are there
};

bool all_arrived(const ExpertGroups& groups, const Arrivals* arrivals) {
  return !arrivals || std::all_of(groups.groups.begin(), groups.groups.end(), [&](const auto& group) {
    return arrivals->state(group.expert) == Arrivals::State::arrived;
  });
}

} // namespace

void run_experts(const ExpertsPlan& plan, const ExpertsCall& call) {
  ExpertGroups groups = group_by_expert(plan, call);
  try {
    if (groups.largest > kMaxRows) {
      return run_many_rows(plan, call, groups);
    }
    bool waits = !all_arrived(groups, call.arrivals);
    FewRows run(plan, call, std::move(groups), waits);
    run();
  } catch (const ArrivingGroups::NeverArrives&) {
    // What an exception would end, MLX's stream, others wait for too.
    std::fill_n(call.out, call.rows * (call.weights ? 1 : call.ranks) * plan.hidden, std::numeric_limits<float>::quiet_NaN());
  }
}

void sum_experts(const ExpertsPlan& plan, const ExpertsCall& call, const float* given) {
  FewRows run(plan, call, {}, false);
  run.sum_given(given);
}

} // namespace edger1
