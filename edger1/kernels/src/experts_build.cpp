#include <array>
#include <sstream>

#include "experts.h"
#include "ops_common.h"

namespace edger1 {
namespace {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream out;
  out << "experts: ";
  (out << ... << parts);
  throw std::invalid_argument(out.str());
}

std::string text(const mx::Shape& shape) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < shape.size(); i++) {
    out << (i ? ", " : "") << shape[i];
  }
  out << ')';
  return out.str();
}

// The value that goes by `name`; refuses another name, saying which there are.
template <class T, size_t N>
T named(const char* what, const std::string& name, const std::array<std::pair<const char*, T>, N>& all) {
  std::string known;
  for (const auto& [candidate, value] : all) {
    if (name == candidate) {
      return value;
    }
    known += (known.empty() ? "\"" : ", \"") + std::string(candidate) + "\"";
  }
  refuse(what, " is \"", name, "\"; expected one of ", known);
}

constexpr std::array<std::pair<const char*, ExpertActivation>, 11> kActivations{{
    {"swiglu", ExpertActivation::swiglu},
    {"geglu", ExpertActivation::geglu},
    {"geglu_approx", ExpertActivation::geglu_tanh},
    {"swiglu_oai", ExpertActivation::swiglu_oai},
    {"swiglu_clipped", ExpertActivation::swiglu_clipped},
    {"swiglu_capped", ExpertActivation::swiglu_capped},
    {"relu", ExpertActivation::relu},
    {"relu2", ExpertActivation::relu2},
    {"silu", ExpertActivation::silu},
    {"gelu", ExpertActivation::gelu},
    {"gelu_approx", ExpertActivation::gelu_tanh},
}};
constexpr std::array<std::pair<const char*, RouterPlan::Score>, 3> kScores{
    {{"softmax", RouterPlan::Score::softmax}, {"sigmoid", RouterPlan::Score::sigmoid}, {"logits", RouterPlan::Score::logits}}};
constexpr std::array<std::pair<const char*, RouterPlan::GroupScore>, 3> kGroupScores{
    {{"none", RouterPlan::GroupScore::none},
     {"best", RouterPlan::GroupScore::best},
     {"best_two", RouterPlan::GroupScore::best_two}}};

void check_bytes(const std::string& what, const std::vector<Bytes>& all, size_t experts, int64_t size, int64_t alignment) {
  if (all.size() != experts) {
    refuse(what, " were given for ", all.size(), " experts; expected ", experts);
  }
  for (size_t e = 0; e < all.size(); e++) {
    if (all[e].size != size || reinterpret_cast<uintptr_t>(all[e].data) % static_cast<uintptr_t>(alignment) != 0) {
      refuse(what, " of expert ", e, " have ", all[e].size, " bytes at ", all[e].data, "; expected ", size,
             " at a multiple of ", alignment);
    }
  }
}

// Adds experts of p.form that lie at these addresses; refuses what does not fit before it adds any.
void add_places(ExpertProjection& p, const std::string& name, const std::vector<Bytes>& codes,
                const std::vector<Bytes>& scales, const std::vector<Bytes>& biases) {
  const Projection& form = p.form;
  size_t experts = codes.size();
  int64_t float_size = bytes_of(form.plain_type), scale_bytes = form.w.scale_stride * form.n;
  bool with_biases = form.quantized && !form.w.fp4;
  check_bytes(name + "'s codes", codes, experts,
              form.quantized ? form.w.row_bytes * form.n : int64_t{form.n} * form.k * float_size,
              form.quantized ? 4 : float_size);
  check_bytes(name + "'s scales", scales, form.quantized ? experts : 0, scale_bytes, bytes_of(form.w.type));
  check_bytes(name + "'s biases", biases, with_biases ? experts : 0, scale_bytes, bytes_of(form.w.type));
  for (size_t e = 0; e < experts; e++) {
    p.at.push_back({codes[e].data, form.quantized ? scales[e].data : nullptr, with_biases ? biases[e].data : nullptr});
  }
}

bool has_no_gaps(const mx::array& a) {
  mx::array evaluated = a;
  evaluated.eval();
  return evaluated.flags().row_contiguous;
}

} // namespace

Experts::Experts(const ExpertsSettings& settings) : held_(std::make_shared<Held>()) {
  auto& plan = held_->plan;
  plan.activation = named("activation", settings.activation, kActivations);
  plan.alpha = settings.alpha;
  plan.limit = settings.limit;
  if (settings.precision != "exact" && settings.precision != "fast") {
    refuse("precision is \"", settings.precision, "\"; expected \"exact\" or \"fast\"");
  }
  plan.fast = settings.precision == "fast";
}

const float* Experts::keep_floats(const mx::array& a, const mx::Shape& shape, const std::string& what) {
  return held_->arrays.keep_floats("experts: " + what, a, shape);
}

// The bias [experts, n] of a projection, in its own type: what is overwritten in place must not be converted.
const char* Experts::keep_bias(ExpertProjection& p, const mx::array& bias, int experts, const std::string& name) {
  if (!is_float(bias.dtype()) || bias.shape() != mx::Shape{experts, p.form.n}) {
    refuse(name, "'s bias has shape ", text(bias.shape()), " and dtype ", bias.dtype(), "; expected floats of shape ",
           text({experts, p.form.n}));
  }
  p.bias_type = float_of(bias.dtype());
  return held_->arrays.keep(bias).data<char>();
}

ExpertProjection& Experts::projection(const std::string& name) {
  auto& plan = held_->plan;
  return *named("projection", name,
                std::array<std::pair<const char*, ExpertProjection*>, 3>{
                    {{"gate", &plan.gate}, {"up", &plan.up}, {"down", &plan.down}}});
}

void Experts::project(const std::string& name, const mx::array& w, const std::optional<mx::array>& scales,
                      const std::optional<mx::array>& biases, const std::optional<mx::array>& bias,
                      const Quantization& q, bool in_place) {
  ExpertProjection& p = projection(name);
  if (w.ndim() != 3 || w.size() == 0) {
    refuse(name, " has shape ", text(w.shape()), "; expected experts, rows and columns");
  }
  for (const mx::array* a : {&w, scales ? &*scales : nullptr, biases ? &*biases : nullptr, bias ? &*bias : nullptr}) {
    if (in_place && a && !has_no_gaps(*a)) {
      refuse(name, " has an array of shape ", text(a->shape()), " with gaps; expected one that can be read where it is");
    }
  }
  p.form = held_->arrays.keep_matrix("experts: " + name, w.shape(1), w, scales, biases, q);
  const auto* codes = static_cast<const char*>(p.form.quantized ? p.form.w.codes : p.form.plain);
  const auto* first_scales = static_cast<const char*>(p.form.w.scales);
  const auto* first_biases = static_cast<const char*>(p.form.w.biases);
  p.appended = 0;
  const char* bias_rows = bias ? keep_bias(p, *bias, w.shape(0), name) : nullptr;
  int64_t bias_bytes = p.form.n * bytes_of(p.bias_type);
  int64_t w_bytes = static_cast<int64_t>(w.nbytes()) / w.shape(0), scale_bytes = p.form.w.scale_stride * p.form.n;
  p.at.clear();
  for (int64_t e = 0; e < w.shape(0); e++) {
    p.at.push_back({codes + e * w_bytes, first_scales ? first_scales + e * scale_bytes : nullptr,
                    first_biases ? first_biases + e * scale_bytes : nullptr,
                    bias_rows ? bias_rows + e * bias_bytes : nullptr});
  }
}

void Experts::project_mapped(const std::string& name, int n, int k, mx::Dtype type, const std::vector<Bytes>& codes,
                             const std::vector<Bytes>& scales, const std::vector<Bytes>& biases,
                             const std::optional<mx::array>& bias, const std::optional<Quantization>& q,
                             std::shared_ptr<const void> owner) {
  ExpertProjection& p = projection(name);
  if (codes.empty() || n < 1 || k < 1 || !is_float(type)) {
    refuse(name, " is [", n, ", ", k, "] of dtype ", type, " for ", codes.size(),
           " experts; expected at least one of each, and floats");
  }
  p.form = q ? quantized_form("experts: " + name, n, k, scale_type(type), *q) : plain_form(n, k, type);
  p.at.clear();
  p.appended = 0;
  add_places(p, name, codes, scales, biases);
  if (bias) {
    const char* rows = keep_bias(p, *bias, static_cast<int>(codes.size()), name);
    for (size_t e = 0; e < codes.size(); e++) {
      p.at[e].bias = rows + static_cast<int64_t>(e) * n * bytes_of(p.bias_type);
    }
  }
  held_->owners.push_back(std::move(owner));
}

void Experts::append_mapped(const std::string& name, const std::vector<Bytes>& codes, const std::vector<Bytes>& scales,
                            const std::vector<Bytes>& biases, const std::vector<Bytes>& bias,
                            std::shared_ptr<const void> owner) {
  ExpertProjection& p = projection(name);
  if (finished_ || !p.present() || codes.empty()) {
    refuse(name, " has ", p.at.size(), " experts, to which ", codes.size(),
           " are appended; expected some of each, before the experts are finished");
  }
  bool with_bias = p.at[0].bias != nullptr;
  int64_t size = bytes_of(p.bias_type);
  check_bytes(name + "'s bias", bias, with_bias ? codes.size() : 0, p.form.n * size, size);
  size_t first = p.at.size();
  add_places(p, name, codes, scales, biases);
  for (size_t e = 0; with_bias && e < codes.size(); e++) {
    p.at[first + e].bias = bias[e].data;
  }
  p.appended += static_cast<int64_t>(codes.size());
  held_->owners.push_back(std::move(owner));
}

void Experts::project_dense(const std::string& name, const mx::array& w, const std::optional<mx::array>& scales,
                            const std::optional<mx::array>& biases, const std::optional<mx::array>& bias,
                            const Quantization& q) {
  auto& plan = held_->plan;
  Projection& p = *named("projection", name,
                         std::array<std::pair<const char*, Projection*>, 5>{{{"router", &plan.router.gate},
                                                                            {"shared_gate", &plan.shared.gate},
                                                                            {"shared_up", &plan.shared.up},
                                                                            {"shared_down", &plan.shared.down},
                                                                            {"shared_weight", &plan.shared.weight}}});
  if (w.ndim() != 2 || w.size() == 0) {
    refuse(name, " has shape ", text(w.shape()), "; expected a matrix");
  }
  p = held_->arrays.keep_matrix("experts: " + name, w.shape(0), w, scales, biases, q);
  if (bias) {
    p.bias = keep_floats(*bias, {p.n}, name + "'s bias");
  }
}

void Experts::router(const RouterSettings& settings, const std::optional<mx::array>& correction) {
  auto& router = held_->plan.router;
  int experts = router.gate.n;
  router.score = named("score", settings.score, kScores);
  router.group_score = named("group_score", settings.group_score, kGroupScores);
  router.ranks = settings.ranks;
  router.groups = router.group_score == RouterPlan::GroupScore::none ? 1 : settings.groups;
  router.groups_kept = settings.groups_kept;
  router.softmax_chosen = settings.softmax_chosen;
  router.normalize = settings.normalize;
  router.epsilon = settings.epsilon;
  router.scale = settings.scale;
  if (settings.ranks < 1 || settings.ranks > experts) {
    refuse("a router chooses ", settings.ranks, " of ", experts, " experts; expected from 1 to all");
  }
  if (router.groups < 1 || experts % router.groups != 0 || (router.groups > 1 && experts / router.groups < 2) ||
      router.groups_kept < 1 || router.groups_kept > router.groups) {
    refuse("a router keeps ", router.groups_kept, " of ", router.groups, " groups of ", experts,
           " experts; expected equal groups of two or more");
  }
  if (correction) {
    router.correction = keep_floats(*correction, {experts}, "the router's correction");
  }
}

void Experts::finish() {
  auto& plan = held_->plan;
  plan.experts = static_cast<int>(plan.up.at.size());
  plan.hidden = plan.up.form.k;
  plan.inner = plan.up.form.n;
  auto fit = [&](const char* name, const Projection& p, int n, int k) {
    if (p.n != n || p.k != k) {
      refuse(name, " is [", p.n, ", ", p.k, "]; expected [", n, ", ", k, "]");
    }
  };
  if (plan.experts == 0 || plan.gate.present() != is_gated(plan.activation)) {
    refuse("the activation takes ", is_gated(plan.activation) ? "gate and up" : "up alone", "; got ",
           plan.gate.present() ? "a gate" : "no gate", " and ", plan.experts, " ups");
  }
  for (auto* p : {&plan.gate, &plan.down}) {
    if (p->present() && (p->at.size() != plan.up.at.size() || p->appended != plan.up.appended)) {
      refuse("there are ", p->at.size(), " gates or downs, ", p->appended, " of them appended, and ", plan.experts, " ups, ",
             plan.up.appended, " of them appended; expected the same");
    }
  }
  if (plan.gate.present()) {
    fit("gate", plan.gate.form, plan.inner, plan.hidden);
  }
  fit("down", plan.down.form, plan.hidden, plan.inner);
  if (plan.router.ranks > 0) {
    // Of any number of experts: those here may be a bank's.
    fit("router", plan.router.gate, plan.router.gate.n, plan.hidden);
  }
  if (plan.shared.present()) {
    fit("shared_down", plan.shared.down, plan.hidden, plan.shared.up.n);
    fit("shared_up", plan.shared.up, plan.shared.down.k, plan.hidden);
    fit("shared_gate", plan.shared.gate, plan.shared.down.k, plan.hidden);
    if (plan.shared.weight.n > 0) {
      fit("shared_weight", plan.shared.weight, 1, plan.hidden);
    }
    if (plan.router.ranks == 0) {
      refuse("a shared expert goes with a router");
    }
  }
  finish_plan(plan);
  finished_ = true;
}

bool Experts::applies(const mx::array& x) const {
  mx::Stream stream = mx::default_stream(mx::default_device());
  return finished_ && x.ndim() >= 1 && x.dtype() == mx::float32 && x.size() > 0 && x.shape(-1) == held_->plan.hidden &&
      stream.device == mx::Device(mx::Device::cpu) && !x.is_tracer();
}

} // namespace edger1
