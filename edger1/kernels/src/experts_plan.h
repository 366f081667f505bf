// The routed experts of one layer as plain pointers and numbers; knows nothing of MLX's graph.
//
//   out[t] = sum over ranks r, in rank order, of weight[t][r] * down_e(act(gate_e(x[t])) * up_e(x[t])),  e = expert[t][r]
//
// or, without a gate, down_e(act(up_e(x[t]))). Everything is float32 but the experts' matrices. Each expert's matrices may
// lie anywhere: one after the other in a stacked tensor, in the slots of a bank, or in a mapped file; an index may thus be a
// slot's, and say nothing of which of the router's experts lies there.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "arrivals.h"
#include "decoder_plan.h"

namespace edger1 {

// One projection of all experts: the shape and quantization of `form`, whose pointers mean nothing, at these addresses.
struct ExpertProjection {
  struct At {
    const void* codes = nullptr;     // quantized codes or plain floats
    const void* scales = nullptr;
    const void* biases = nullptr;
    const void* bias = nullptr;      // [n] of bias_type, or null
  };

  Projection form;
  Float bias_type = Float::f32;
  std::vector<At> at;
  int64_t appended = 0;              // how many of the last were added to those of the stacked tensor or bank

  bool present() const {
    return form.n > 0;
  }
  // Without its bias.
  Projection operator[](int64_t expert) const;
  // Adds elements n0..n1 of the expert's bias, if it has one, to each of m rows.
  void add_bias(int64_t expert, float* const* rows, int m, int n0, int n1) const;
};

enum class ExpertActivation {
  swiglu,          // silu(gate) * up
  geglu,
  geglu_tanh,
  swiglu_oai,      // gpt-oss: gate and up clipped to limit, gate * sigmoid(alpha * gate) * (up + 1)
  swiglu_clipped,  // gate and up clipped to limit, then swiglu
  swiglu_capped,   // silu(gate) and up clipped to limit
  // Without a gate:
  relu,
  relu2,
  silu,
  gelu,
  gelu_tanh,
};

// How a token's experts are found from its logits over all of them.
struct RouterPlan {
  enum class Score { softmax, sigmoid, logits };
  enum class GroupScore { none, best, best_two };

  Projection gate;                   // [experts, hidden]; as many experts as it has rows
  Score score = Score::softmax;
  const float* correction = nullptr; // [experts], added to scores for choosing alone
  GroupScore group_score = GroupScore::none;
  int groups = 1, groups_kept = 1;   // scores in other groups than the best `groups_kept` count as 0
  int ranks = 0;                     // experts chosen for a token
  bool softmax_chosen = false;       // the chosen scores become their softmax
  bool normalize = false;            // the chosen scores are divided by their sum + epsilon
  float epsilon = 0;
  float scale = 1;                   // multiplies the weights at last
};

// A gated MLP that every token passes beside its experts; its result is added after theirs.
struct SharedPlan {
  Projection gate, up, down;
  Projection weight;                 // [1, hidden]: the result is multiplied with the sigmoid of it; n = 0 without
  ExpertActivation activation = ExpertActivation::swiglu;

  bool present() const {
    return down.n > 0;
  }
};

struct ExpertsPlan {
  bool fast = false;
  int experts = 0, hidden = 0, inner = 0; // experts: how many places of experts, which are what indices name
  ExpertProjection gate, up, down;   // gate.present() only with gated activations
  ExpertActivation activation = ExpertActivation::swiglu;
  float alpha = 1.702f, limit = 7.0f;
  RouterPlan router;                 // router.ranks = 0: none
  SharedPlan shared;

  // Representatives of the different forms in which rows are prepared: of x (for gates, ups and router), of what the
  // experts' down and the shared expert's down read.
  std::vector<Projection> x_forms, inner_forms, shared_forms;

  // Whether the router's indices are those of the experts here: a bank of fewer slots needs a table in between.
  bool routes_here() const {
    return router.ranks > 0 && router.gate.n == experts - up.appended;
  }
};

bool is_gated(ExpertActivation activation);

// Decides which projections can share prepared rows.
void finish_plan(ExpertsPlan& plan);

struct ExpertsCall {
  int64_t rows = 0;                  // tokens
  int ranks = 0;
  const float* x = nullptr;          // [rows, hidden], x_stride apart
  int64_t x_stride = 0;
  const uint32_t* experts = nullptr; // [rows, ranks]
  const float* weights = nullptr;    // [rows, ranks]; null: out is [rows, ranks, hidden], what each expert gives
  bool with_shared = false;          // at most kMaxRows rows
  Arrivals* arrivals = nullptr;      // which of `experts`, that are slots then, have been read; null: all
  float* out = nullptr;              // [rows, hidden]
};

// Throws std::invalid_argument where an index names no expert; nothing has been computed by then. Uses both scratch slots.
//
// Experts that have not arrived are waited for while others are computed, and summed in rank order when all are there: the
// same bits in whatever order they come. Where one fails, or the waiting is aborted, `out` is NaN throughout.
void run_experts(const ExpertsPlan& plan, const ExpertsCall& call);

// What run_experts gives with weights, from what each expert gave without them: `given` [rows, ranks, hidden]. The same
// bits; `call` needs no experts.
void sum_experts(const ExpertsPlan& plan, const ExpertsCall& call, const float* given);

// The experts [rows, ranks] and weights of each row of x, as `call` describes it. Of equal scores the first wins; ranks are
// in falling order of score.
void run_router(const ExpertsPlan& plan, const ExpertsCall& call, uint32_t* experts, float* weights);

// Pairs of token and rank ordered by expert.
struct ExpertGroups {
  struct Group {
    int64_t expert, begin, end;
  };

  std::vector<Group> groups;         // only those with pairs, by expert
  std::vector<int64_t> pairs;        // row * ranks + rank
  int64_t largest = 0;               // pairs in a group
};

ExpertGroups group_by_expert(const ExpertsPlan& plan, const ExpertsCall& call);

// Some of the groups, from first to last.
struct GroupRange {
  size_t first = 0, last = 0;
};

// Takes the groups as their experts arrive: each call of next() moves those that have come to the place behind the ones it
// gave before, and returns where they are. It gives nothing when all were given; it gives an empty range, at the first call
// only and if `at_once`, where none has come yet and there is something else to compute. Throws NeverArrives where one of
// those that are left has failed, or the waiting was aborted. The order of pairs does not change.
class ArrivingGroups {
 public:
  struct NeverArrives {};

  ArrivingGroups(ExpertGroups& groups, Arrivals* arrivals, bool at_once)
      : groups_(groups), arrivals_(arrivals), at_once_(at_once) {}

  std::optional<GroupRange> next();

 private:
  ExpertGroups& groups_;
  Arrivals* arrivals_;               // null: all have arrived
  bool at_once_;
  size_t given_ = 0;
};

// The experts' part where an expert has more than kMaxRows rows.
void run_many_rows(const ExpertsPlan& plan, const ExpertsCall& call, ExpertGroups& groups);

// h = act(gate) * up, or act(up) without a gate; h may be either.
void activate(const ExpertsPlan& plan, ExpertActivation activation, float* h, const float* gate, const float* up,
              int64_t n);

// out[t] = sum of weights[t][r] * parts[t * ranks + r] in order of r; rows of `parts` are n long and `stride` apart.
void sum_ranks(float* out, const float* parts, int64_t stride, const float* weights, int ranks, int n);

} // namespace edger1
