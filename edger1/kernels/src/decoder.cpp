#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <span>
#include <sstream>

#include "mlx/transforms.h"
#include "ops_common.h"
#include "qmm_driver.h"
#include "rope.h"

namespace edger1 {
namespace {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream out;
  out << "decoder layer: ";
  (out << ... << parts);
  throw std::invalid_argument(out.str());
}

// An array whose buffer is the caller's alone: the input's own where nobody else holds it, else a copy. It is a primitive of
// its own because an operation with several outputs cannot see who else holds its inputs.
class Claim : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;

  const char* name() const override {
    return "EdgeR1Claim";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const auto& in = inputs[0];
    auto& out = outputs[0];
    if (in.is_donatable() && in.flags().row_contiguous && in.data_size() == in.size()) {
      out.copy_shared_buffer(in);
      return;
    }
    allocate(out);
    // Bits are copied, whatever they mean.
    Rows from;
    from.data = in.data<void>();
    from.map = RowMap(in, 1);
    from.step = in.shape(-1) == 1 ? 1 : in.strides(-1);
    from.n = in.shape(-1);
    float* to = static_cast<float*>(out.data<void>());
    launch(stream(), [from, to] {
      parallel_ranges(from.map.rows(), grain_for(from.map.rows(), from.n, 16384), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
          float* place = to + r * from.n;
          const float* row = from.fetch(r, place);
          if (row != place) {
            std::memcpy(place, row, sizeof(float) * static_cast<size_t>(from.n));
          }
        }
      });
    });
  }
};

} // namespace

mx::array claim(const mx::array& a, mx::Stream stream) {
  return mx::array(a.shape(), a.dtype(), std::make_shared<Claim>(stream), {a});
}


// Inputs x, keys, values and perhaps a mask and starts; outputs out, keys and values in the inputs' buffers, and perhaps the MLP's input.
// The inputs keys and values are claimed.
class DecoderLayerOp : public CpuPrimitive {
 public:
  DecoderLayerOp(mx::Stream stream, std::shared_ptr<const DecoderLayer::Held> held, int offset, CacheOrder order,
                 bool has_mask, bool has_starts, RowFormat format)
      : CpuPrimitive(stream), held_(std::move(held)), offset_(offset), order_(order), has_mask_(has_mask),
        has_starts_(has_starts), format_(format) {}

  const char* name() const override {
    return "EdgeR1DecoderLayer";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    std::vector<mx::Shape> shapes{inputs[0].shape(), inputs[1].shape(), inputs[2].shape()};
    if (held_->gives_normed()) {
      shapes.push_back(inputs[0].shape());
    }
    return shapes;
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const auto& x = inputs[0];
    allocate(outputs[0]);
    outputs[1].copy_shared_buffer(inputs[1]);
    outputs[2].copy_shared_buffer(inputs[2]);
    DecoderCall call;
    call.batch = x.shape(0);
    call.length = x.shape(1);
    call.x = x.data<float>();
    call.x_stride = x.shape(0) == 1 ? x.strides(1) : x.strides(0) / x.shape(1);
    call.out = outputs[0].data<float>();
    if (outputs.size() > 3) {
      allocate(outputs[3]);
      call.normed = outputs[3].data<float>();
    }
    call.keys = outputs[1].data<void>();
    call.values = outputs[2].data<void>();
    call.format = format_;
    call.order = order_;
    call.offset = offset_;
    if (has_mask_) {
      const auto& mask = inputs[3];
      call.mask.keep = mask.dtype() == mx::bool_ ? mask.data<bool>() : nullptr;
      call.mask.add = mask.dtype() == mx::bool_ ? nullptr : mask.data<float>();
      for (int i = 1; i <= static_cast<int>(mask.ndim()); i++) {
        call.mask.strides[4 - i] = mask.shape(-i) == 1 ? 0 : mask.strides(-i);
      }
    }
    bool rows_apart = x.strides(2) == 1 &&
        (x.shape(0) == 1 || x.shape(1) == 1 || x.strides(0) == x.strides(1) * x.shape(1));
    if (x.shape(1) == 1) {
      call.x_stride = x.strides(0);
    }
    const int32_t* starts = has_starts_ ? inputs.back().data<int32_t>() : nullptr;
    int64_t start_stride = has_starts_ ? inputs.back().strides(0) : 0;
    std::optional<Rows> rows;
    if (!rows_apart) {
      rows.emplace(x);
    }
    launch(stream(), [held = held_, call, rows, starts, start_stride]() mutable {
      for (int64_t r = 0; rows && r < rows->map.rows(); r++) {
        float* to = call.out + r * rows->n;
        const float* from = rows->fetch(r, to);
        if (from != to) {
          std::memcpy(to, from, sizeof(float) * static_cast<size_t>(rows->n));
        }
      }
      if (rows) {
        call.x = call.out;
        call.x_stride = rows->n;
      }
      int first_slots[kMaxRows];
      for (int b = 0; starts && b < call.batch; b++) {
        first_slots[b] = std::clamp(starts[b * start_stride], 0, call.offset + call.length - 1);
      }
      call.first_slots = starts ? first_slots : nullptr;
      const DecoderPlan* plan = &held->plan;
      run_decoder_layers(&plan, &call, 1);
    });
  }

 private:
  std::shared_ptr<const DecoderLayer::Held> held_;
  int offset_;
  CacheOrder order_;
  bool has_mask_, has_starts_;
  RowFormat format_;
};

DecoderLayer::DecoderLayer(const DecoderSettings& settings) : held_(std::make_shared<Held>()) {
  auto& plan = held_->plan;
  plan.heads = settings.heads;
  plan.kv_heads = settings.kv_heads;
  plan.head_dim = settings.head_dim;
  plan.attention_scale = settings.attention_scale;
  plan.residual_scale = settings.residual_scale;
  plan.soft_cap = settings.soft_cap;
  plan.parallel = settings.parallel;
  plan.residual = settings.residual;
  plan.norms_after_rope = settings.norms_after_rope;
  if (plan.heads < 1 || plan.kv_heads < 1 || plan.head_dim < 1 || plan.heads % plan.kv_heads != 0) {
    refuse(plan.heads, " heads over ", plan.kv_heads, " key heads of ", plan.head_dim, "; expected a multiple");
  }
  if (settings.precision != "exact" && settings.precision != "fast") {
    refuse("precision is \"", settings.precision, "\"; expected \"exact\" or \"fast\"");
  }
  plan.fast = settings.precision == "fast";
  if (settings.activation == "swiglu") {
    plan.activation = Gate::swiglu;
  } else if (settings.activation == "geglu") {
    plan.activation = Gate::geglu;
  } else if (settings.activation == "geglu_approx") {
    plan.activation = Gate::geglu_tanh;
  } else {
    refuse("activation is \"", settings.activation, "\"; expected \"swiglu\", \"geglu\" or \"geglu_approx\"");
  }
}

const float* DecoderLayer::keep_floats(const mx::array& a, int n, const std::string& what) {
  return held_->arrays.keep_floats("decoder layer: " + what, a, {n});
}

Projection& DecoderLayer::projection(const std::string& name) {
  auto& plan = held_->plan;
  std::pair<const char*, Projection*> all[] = {{"q", &plan.q},       {"k", &plan.k},   {"v", &plan.v},      {"o", &plan.o},
                                               {"gate", &plan.gate}, {"up", &plan.up}, {"down", &plan.down}};
  for (auto& [known, found] : all) {
    if (name == known) {
      return *found;
    }
  }
  refuse("no projection is called \"", name, "\"");
}

void DecoderLayer::project(const std::string& name, const mx::array& w, const std::optional<mx::array>& scales,
                           const std::optional<mx::array>& biases, const std::optional<mx::array>& bias, int group_size,
                           int bits, const std::string& mode) {
  Projection& p = projection(name);
  if (w.ndim() != 2 || w.size() == 0) {
    refuse(name, " has ", w.ndim(), " axes; expected a matrix");
  }
  p = held_->arrays.keep_matrix("decoder layer: " + name, w.shape(0), w, scales, biases, {group_size, bits, mode});
  if (p.quantized) {
    find_bias_ratio(p.w);
  }
  if (bias) {
    p.bias = keep_floats(*bias, p.n, name + "'s bias");
  }
}

void DecoderLayer::norm(const std::string& name, const mx::array& weight, float eps, bool centered,
                        const std::optional<mx::array>& bias) {
  auto& plan = held_->plan;
  std::pair<const char*, NormPlan*> all[] = {{"attention", &plan.attention_norm}, {"q", &plan.q_norm},
                                             {"k", &plan.k_norm},                 {"attention_post", &plan.attention_post_norm},
                                             {"mlp", &plan.mlp_norm},             {"mlp_post", &plan.mlp_post_norm}};
  for (auto& [known, found] : all) {
    if (name == known) {
      const float* kept = keep_floats(weight, static_cast<int>(weight.size()), name + "'s norm");
      int n = weight.shape(0);
      *found = {kept, eps, centered, bias ? keep_floats(*bias, n, name + "'s norm's bias") : nullptr};
      if (bias && !centered) {
        refuse(name, "'s norm has a bias; expected one of a layer norm only");
      }
      if (name == "q" || name == "k") {
        int heads = name == "q" ? plan.heads : plan.kv_heads;
        bool whole = n == heads * plan.head_dim && heads > 1;
        bool other = name == "q" ? plan.k_norm.weight != nullptr : plan.q_norm.weight != nullptr;
        if ((!whole && n != plan.head_dim) || (other && heads > 1 && whole != plan.whole_width_norms)) {
          refuse(name, "'s norm has ", n, " elements; expected ", plan.head_dim, " or as many as all heads together");
        }
        plan.whole_width_norms = plan.whole_width_norms || whole;
      } else {
        norm_widths_.emplace_back(name, n);
      }
      return;
    }
  }
  refuse("no norm is called \"", name, "\"");
}

void DecoderLayer::sinks(const mx::array& sinks) {
  held_->plan.sinks = keep_floats(sinks, held_->plan.heads, "sinks");
}

void DecoderLayer::rope(int dims, bool interleaved, std::optional<float> base, const std::optional<mx::array>& freqs,
                        float scale, float multiplier) {
  auto& plan = held_->plan;
  int half = dims / 2;
  if (dims < 2 || dims % 2 != 0 || dims > plan.head_dim || base.has_value() == freqs.has_value()) {
    refuse("a rotation of ", dims, " of ", plan.head_dim, " elements by ", base ? "a base" : "no base", " and ",
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

void DecoderLayer::finish() {
  auto& plan = held_->plan;
  plan.has_mlp = plan.gate.n != 0 || plan.up.n != 0 || plan.down.n != 0;
  plan.inner = plan.gate.n;
  plan.hidden = plan.q.k;
  int q = plan.heads * plan.head_dim, kv = plan.kv_heads * plan.head_dim;
  struct Fit {
    const char* name;
    const Projection& p;
    int n, k;
  } fits[] = {{"q", plan.q, q, plan.hidden},           {"k", plan.k, kv, plan.hidden},
              {"v", plan.v, kv, plan.hidden},          {"o", plan.o, plan.hidden, q},
              {"gate", plan.gate, plan.inner, plan.hidden}, {"up", plan.up, plan.inner, plan.hidden},
              {"down", plan.down, plan.hidden, plan.inner}};
  for (const Fit& fit : std::span(fits, plan.has_mlp ? 7 : 4)) {
    if (fit.n < 1 || fit.k < 1 || fit.p.n != fit.n || fit.p.k != fit.k) {
      refuse(fit.name, " is [", fit.p.n, ", ", fit.p.k, "]; expected [", fit.n, ", ", fit.k, "]");
    }
  }
  for (const auto& [name, n] : norm_widths_) {
    if (n != plan.hidden) {
      refuse(name, "'s norm has ", n, " elements; expected ", plan.hidden);
    }
  }
  if (plan.has_mlp && !plan.residual) {
    refuse("an MLP after attention without residual");
  }
  finish_plan(plan);
  finished_ = true;
}

std::optional<DecoderOutputs> DecoderLayer::operator()(const mx::array& x, const mx::array& keys, const mx::array& values,
                                                       const CachePlace& place,
                                                       const std::optional<mx::array>& mask_in) const {
  const auto& plan = held_->plan;
  mx::Stream stream = mx::default_stream(mx::default_device());
  if (!finished_ || x.ndim() != 3 || x.dtype() != mx::float32 || x.size() == 0 || x.shape(2) != plan.hidden ||
      int64_t{x.shape(0)} * x.shape(1) > kMaxRows || stream.device != mx::Device(mx::Device::cpu) || x.is_tracer() ||
      keys.is_tracer() || values.is_tracer() || keys.dtype() != (place.format.packed() ? mx::uint32 : mx::float32) ||
      values.dtype() != keys.dtype() || keys.ndim() != 4 || place.offset < 0 ||
      (place.format.packed() && !place.format.fits(plan.head_dim))) {
    return std::nullopt;
  }
  int length = x.shape(1), capacity = keys.shape(2);
  int64_t end = int64_t{place.offset} + length, count = place.count ? *place.count : end;
  mx::Shape expected{x.shape(0), plan.kv_heads, capacity, place.format.words(plan.head_dim)};
  if (keys.shape() != expected || values.shape() != expected || end > std::numeric_limits<int>::max() || count > end ||
      count < length || count > capacity || place.first_slot < 0 || place.first_slot >= capacity) {
    return std::nullopt;
  }
  std::vector<mx::array> inputs{x, claim(keys, stream), claim(values, stream)};
  if (mask_in) {
    // Masks count slots, of which those in use come first.
    int slots = place.first_slot == 0 ? static_cast<int>(count) : capacity;
    mx::Shape shape{x.shape(0), plan.heads, length, slots};
    bool fits = mask_in->ndim() <= 4 && (mask_in->dtype() == mx::bool_ || mask_in->dtype() == mx::float32) &&
        !mask_in->is_tracer();
    for (int i = 1; fits && i <= static_cast<int>(mask_in->ndim()); i++) {
      fits = mask_in->shape(-i) == 1 || mask_in->shape(-i) == shape[4 - i];
    }
    if (!fits) {
      return std::nullopt;
    }
    inputs.push_back(*mask_in);
  }
  if (place.starts) {
    if (place.starts->shape() != mx::Shape{x.shape(0)} || place.starts->dtype() != mx::int32 || place.starts->is_tracer() ||
        place.first_slot != 0 || count != end) {
      return std::nullopt;
    }
    inputs.push_back(*place.starts);
  }
  refuse_if_forked();
  CacheOrder order{static_cast<int>(end - count), place.first_slot, capacity};
  std::vector<mx::Shape> shapes{x.shape(), expected, expected};
  if (held_->gives_normed()) {
    shapes.push_back(x.shape());
  }
  std::vector<mx::Dtype> types(shapes.size(), mx::float32);
  types[1] = types[2] = keys.dtype();
  auto outputs = mx::array::make_arrays(shapes, types,
                                        std::make_shared<DecoderLayerOp>(stream, held_, place.offset, order,
                                                                         mask_in.has_value(), place.starts.has_value(),
                                                                         place.format),
                                        std::move(inputs));
  DecoderOutputs done{outputs[0], outputs[1], outputs[2], std::nullopt};
  if (outputs.size() > 3) {
    done.normed = outputs[3];
  }
  return done;
}

} // namespace edger1
