#include <sstream>

#include "latent.h"
#include "ops_common.h"
#include "rope.h"

namespace edger1 {
namespace {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream out;
  out << "latent attention: ";
  (out << ... << parts);
  throw std::invalid_argument(out.str());
}

// Some rows of a matrix.
Projection rows_of(const Projection& all, int64_t first, int rows) {
  Projection p = all;
  p.n = rows;
  if (p.quantized) {
    p.w.n = rows;
    p.w.codes += first * p.w.row_bytes;
    p.w.scales = static_cast<const char*>(p.w.scales) + first * p.w.scale_stride;
    p.w.biases = p.w.fp4 ? nullptr : static_cast<const char*>(p.w.biases) + first * p.w.bias_stride;
  } else {
    p.plain = offset(p.plain, p.plain_type, first * p.plain_stride);
  }
  return p;
}

} // namespace

LatentAttention::LatentAttention(const LatentSettings& settings) : held_(std::make_shared<Held>()) {
  auto& plan = held_->plan;
  plan.heads = settings.heads;
  plan.nope = settings.nope;
  plan.rope = settings.rope;
  plan.rank = settings.rank;
  plan.value = settings.value;
  plan.scale = settings.scale;
  if (plan.heads < 1 || plan.nope < 1 || plan.rope < 0 || plan.rank < 1 || plan.value < 1) {
    refuse(plan.heads, " heads of ", plan.nope, " + ", plan.rope, " over a rank of ", plan.rank, " with values of ",
           plan.value, "; expected positive numbers");
  }
  if (settings.precision != "exact" && settings.precision != "fast") {
    refuse("precision is \"", settings.precision, "\"; expected \"exact\" or \"fast\"");
  }
  plan.fast = settings.precision == "fast";
}

const float* LatentAttention::keep_floats(const mx::array& a, int n, const std::string& what) {
  return held_->arrays.keep_floats("latent attention: " + what, a, {n});
}

void LatentAttention::project(const std::string& name, const mx::array& w, const std::optional<mx::array>& scales,
                              const std::optional<mx::array>& biases, const std::optional<mx::array>& bias,
                              int group_size, int bits, const std::string& mode) {
  auto& plan = held_->plan;
  bool embed = name == "embed", stacked = embed || name == "unembed";
  if (w.ndim() != (stacked ? 3 : 2) || w.size() == 0) {
    refuse(name, " has ", w.ndim(), " axes and ", w.size(), " elements; expected ", stacked ? "a matrix a head" : "a matrix");
  }
  // All rows of a matrix, or of a stack of them.
  int64_t rows = static_cast<int64_t>(w.size()) / w.shape(-1);
  Projection p = held_->arrays.keep_matrix("latent attention: " + name, rows, w, scales, biases, {group_size, bits, mode});
  if (stacked) {
    int n = embed ? plan.rank : plan.value, k = embed ? plan.nope : plan.rank;
    if (w.shape(0) != plan.heads || w.shape(1) != n || p.k != k || bias) {
      refuse(name, " is [", w.shape(0), ", ", w.shape(1), ", ", p.k, bias ? "] with a bias" : "]", "; expected [",
             plan.heads, ", ", n, ", ", k, "]");
    }
    auto& heads = embed ? plan.embed : plan.unembed;
    heads.clear();
    for (int h = 0; h < plan.heads; h++) {
      heads.push_back(rows_of(p, int64_t{h} * n, n));
    }
    plan.embed_by_rows = plan.embed_by_rows && !embed;
    return;
  }
  if (name == "kv_b") {
    int rows_of_head = plan.nope + plan.value;
    if (p.n != plan.heads * rows_of_head || p.k != plan.rank || bias) {
      refuse(name, " is [", p.n, ", ", p.k, bias ? "] with a bias" : "]", "; expected [", plan.heads * rows_of_head, ", ",
             plan.rank, "]");
    }
    plan.embed.clear();
    plan.unembed.clear();
    for (int h = 0; h < plan.heads; h++) {
      int64_t first = int64_t{h} * rows_of_head;
      plan.embed.push_back(rows_of(p, first, plan.nope));
      plan.unembed.push_back(rows_of(p, first + plan.nope, plan.value));
    }
    plan.embed_by_rows = true;
    return;
  }
  if (bias) {
    p.bias = keep_floats(*bias, p.n, name + "'s bias");
  }
  if (name == "q_a") {
    plan.q_a = p;
  } else if (name == "q") {
    plan.q = p;
  } else if (name == "kv_a") {
    plan.kv_a = p;
  } else if (name == "o") {
    plan.o = p;
  } else {
    refuse("no projection is called \"", name, "\"");
  }
}

void LatentAttention::norm(const std::string& name, const mx::array& weight, float eps) {
  if (name == "q") {
    held_->plan.q_norm = {keep_floats(weight, held_->plan.q_a.n, "q's norm"), eps};
  } else if (name == "kv") {
    held_->plan.kv_norm = {keep_floats(weight, held_->plan.rank, "kv's norm"), eps};
  } else {
    refuse("no norm is called \"", name, "\"");
  }
}

void LatentAttention::rope(int dims, bool interleaved, std::optional<float> base, const std::optional<mx::array>& freqs,
                           float scale, float multiplier) {
  auto& plan = held_->plan;
  int half = dims / 2;
  if (dims < 2 || dims % 2 != 0 || dims > plan.rope || base.has_value() == freqs.has_value()) {
    refuse("a rotation of ", dims, " of ", plan.rope, " elements by ", base ? "a base" : "no base", " and ",
           freqs ? "frequencies" : "no frequencies", "; expected an even number of them and one of the two");
  }
  plan.rope_dims = dims;
  plan.rope_interleaved = interleaved;
  plan.rope_scale = scale;
  plan.rope_multiplier = multiplier;
  const float* given = freqs ? keep_floats(*freqs, half, "rope's frequencies") : nullptr;
  plan.inverse_freqs.clear();
  for (int i = 0; i < half; i++) {
    plan.inverse_freqs.push_back(given ? 1.0f / given[i] : inverse_frequency(*base, i, half));
  }
}

void LatentAttention::finish(bool whole) {
  auto& plan = held_->plan;
  if (plan.embed.empty() || plan.unembed.empty()) {
    refuse("the matrices of keys (embed) and values (unembed), or of both (kv_b), are needed");
  }
  if (whole) {
    plan.hidden = plan.kv_a.k;
    int q_in = plan.q_a.n > 0 ? plan.q_a.n : plan.hidden;
    struct Fit {
      const char* name;
      const Projection& p;
      int n, k;
    } fits[] = {{"q_a", plan.q_a, plan.q_a.n, plan.q_a.n > 0 ? plan.hidden : 0},
                {"q", plan.q, plan.heads * (plan.nope + plan.rope), q_in},
                {"kv_a", plan.kv_a, plan.rank + plan.rope, plan.hidden},
                {"o", plan.o, plan.hidden, plan.heads * plan.value}};
    for (const Fit& fit : fits) {
      if (fit.p.n != fit.n || fit.p.k != fit.k || (fit.n == 0 && fit.k != 0)) {
        refuse(fit.name, " is [", fit.p.n, ", ", fit.p.k, "]; expected [", fit.n, ", ", fit.k, "]");
      }
    }
    if (plan.hidden < 1 || !plan.kv_norm.weight || (plan.q_a.n > 0 && !plan.q_norm.weight)) {
      refuse("norms of the latents and, with q_a, of its result are needed");
    }
  }
  // Like int8 rows, bf16 is for layers whose weights were rounded more than that.
  plan.bf16 = plan.fast && plan.embed[0].quantized && plan.unembed[0].quantized;
  plan.whole = whole;
  finished_ = true;
}

} // namespace edger1
