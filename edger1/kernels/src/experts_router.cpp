#include <algorithm>
#include <limits>

#include "dense_driver.h"
#include "experts_plan.h"
#include "few_rows.h"

namespace edger1 {
namespace {

// The first `count` indices in falling order of value; of equal ones the first. Always `count` different ones, whatever
// the values are.
void largest(const float* values, int n, int count, uint32_t* indices) {
  int held = 0;
  for (int i = 0; i < n; i++) {
    if (held == count && !(values[i] > values[indices[count - 1]])) {
      continue;
    }
    int at = held < count ? held++ : count - 1;
    for (; at > 0 && values[i] > values[indices[at - 1]]; at--) {
      indices[at] = indices[at - 1];
    }
    indices[at] = static_cast<uint32_t>(i);
  }
}

// Zeroes the scores of all groups but the best.
void keep_best_groups(const RouterPlan& router, float* scores, int experts, uint32_t* order, float* values) {
  int size = experts / router.groups;
  for (int g = 0; g < router.groups; g++) {
    const float* group = scores + g * size;
    float best = -std::numeric_limits<float>::infinity(), second = best;
    for (int i = 0; i < size; i++) {
      second = group[i] > best ? best : std::max(second, group[i]);
      best = std::max(best, group[i]);
    }
    values[g] = router.group_score == RouterPlan::GroupScore::best ? best : best + second;
  }
  largest(values, router.groups, router.groups, order);
  for (int g = router.groups_kept; g < router.groups; g++) {
    std::fill_n(scores + static_cast<int>(order[g]) * size, size, 0.0f);
  }
}

void route(const RouterPlan& router, float* logits, float* selection, int experts, uint32_t* chosen, float* weights) {
  if (router.score == RouterPlan::Score::softmax) {
    ops().softmax(logits, logits, experts);
  } else if (router.score == RouterPlan::Score::sigmoid) {
    ops().unary(Unary::sigmoid, logits, logits, experts);
  }
  const float* scores = logits;
  float* by = selection;
  std::copy_n(scores, experts, by);
  if (router.correction) {
    ops().blend_row(by, 1, router.correction, 1, experts);
  }
  if (router.groups > 1) {
    // Behind the scores there is room for an order and a value of each group.
    keep_best_groups(router, by, experts, reinterpret_cast<uint32_t*>(by + experts), by + 2 * experts);
  }
  largest(by, experts, router.ranks, chosen);
  // Where nothing but groups stood between scores and choice, models take the weights from what is left of the scores.
  const float* from = router.groups > 1 && !router.correction ? by : scores;
  for (int r = 0; r < router.ranks; r++) {
    weights[r] = from[chosen[r]];
  }
  if (router.softmax_chosen) {
    ops().softmax(weights, weights, router.ranks);
  }
  if (router.normalize) {
    float sum = 0;
    for (int r = 0; r < router.ranks; r++) {
      sum += weights[r];
    }
    for (int r = 0; r < router.ranks; r++) {
      weights[r] /= sum + router.epsilon;
    }
  }
  for (int r = 0; r < router.ranks && router.scale != 1; r++) {
    weights[r] *= router.scale;
  }
}

// Logits of all rows, [rows, experts].
void score(const ExpertsPlan& plan, const ExpertsCall& call, float* logits) {
  const Projection& gate = plan.router.gate;
  if (call.rows > kMaxRows) {
    if (!gate.quantized) {
      Matrix x{call.x, Float::f32, call.x_stride, 1}, w{gate.plain, gate.plain_type, 1, gate.plain_stride};
      matmul(logits, gate.n, x, w, gate.bias, call.rows, gate.n, gate.k);
      return;
    }
    QmmJob job;
    job.fast = plan.fast;
    job.x.data = call.x;
    for (int64_t i = 0; i < call.rows; i++) {
      job.x.offsets.push_back(i * call.x_stride);
      job.x_rows.push_back(i);
    }
    job.out_rows = job.x_rows;
    job.groups.push_back({gate.w, 0, call.rows});
    job.out = logits;
    job.out_columns = gate.n;
    run_qmm(job);
    for (int64_t i = 0; i < call.rows && gate.bias; i++) {
      ops().blend_row(logits + i * gate.n, 1, gate.bias, 1, gate.n);
    }
    return;
  }
  std::vector<Projection> forms{gate};
  PreparedRows x(forms, call.rows, plan.fast);
  x.place(static_cast<char*>(thread_scratch(1, static_cast<size_t>(x.bytes()))));
  x.prepare_all(call.x, call.x_stride);
  const void* rows[kMaxRows];
  for (int64_t i = 0; i < call.rows; i++) {
    rows[i] = x.row(0, i);
  }
  sweep_rows(gate.n, gate.row_bytes() + gate.k / 8 * call.rows, gate.n, [&](int64_t n0, int64_t n1) {
    float* to[kMaxRows];
    for (int64_t i = 0; i < call.rows; i++) {
      to[i] = logits + i * gate.n + n0;
    }
    multiply_rows(gate, plan.fast, rows, static_cast<int>(call.rows), static_cast<int>(n0), static_cast<int>(n1), to);
  });
}

} // namespace

void run_router(const ExpertsPlan& plan, const ExpertsCall& call, uint32_t* experts, float* weights) {
  const RouterPlan& router = plan.router;
  int n = router.gate.n;
  std::vector<float> logits(static_cast<size_t>(call.rows * n));
  score(plan, call, logits.data());
  parallel_ranges(call.rows, grain_for(call.rows, n * 4.0, 8192), [&](int64_t t, int64_t end) {
    auto* selection = static_cast<float*>(thread_scratch(0, size_t(n) * 3 * 4));
    for (; t < end; t++) {
      route(router, &logits[t * n], selection, n, experts + t * router.ranks, weights + t * router.ranks);
    }
  });
}

} // namespace edger1
