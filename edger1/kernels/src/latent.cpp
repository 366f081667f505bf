#include "latent.h"

#include <cstring>
#include <sstream>

#include "append.h"
#include "hand_on.h"
#include "ops_common.h"

namespace edger1 {
namespace {

LatentRows latent_rows(const mx::array& a, RowFormat format = {}) {
  Float type = format.packed() ? Float::f32 : float_of(a.dtype());
  return {a.data<void>(), type, a.strides(0), a.strides(1), a.strides(2), a.shape(3) == 1 ? 1 : a.strides(3), format};
}

// A boolean mask as [B, L, S], or nothing if it differs by head or does not broadcast.
std::optional<mx::array> row_mask(const mx::array& mask, int batch, int length, int keys, mx::Stream stream) {
  if (mask.dtype() != mx::bool_ || mask.ndim() > 4 || mask.is_tracer()) {
    return std::nullopt;
  }
  mx::Shape shape(4 - mask.ndim(), 1);
  shape.insert(shape.end(), mask.shape().begin(), mask.shape().end());
  bool fits = shape[1] == 1 && (shape[0] == 1 || shape[0] == batch) && (shape[2] == 1 || shape[2] == length) &&
      (shape[3] == 1 || shape[3] == keys);
  if (!fits) {
    return std::nullopt;
  }
  auto three = mx::reshape(mask, {shape[0], shape[2], shape[3]}, stream);
  return mx::broadcast_to(three, {batch, length, keys}, stream);
}

void use_mask(const mx::array& mask, const bool*& keep, int64_t* strides) {
  keep = mask.data<bool>();
  for (int i = 0; i < 3; i++) {
    strides[i] = mask.strides(i);
  }
}

// An array whose buffer is the caller's alone: the input's own where nobody else holds it, else a copy. It is a primitive of
// its own because an operation with several outputs cannot see who else holds its inputs.
class ClaimCache : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;

  const char* name() const override {
    return "EdgeR1ClaimCache";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const auto& in = inputs[0];
    auto& out = outputs[0];
    if (in.flags().row_contiguous && in.data_size() == in.size() && sole_holder(in, stream())) {
      out.copy_shared_buffer(in);
      return;
    }
    allocate(out);
    Rows from(in);
    float* to = out.data<float>();
    launch(stream(), [from, to] {
      for (int64_t r = 0; r < from.map.rows(); r++) {
        float* place = to + r * from.n;
        const float* row = from.fetch(r, place);
        if (row != place) {
          std::memcpy(place, row, sizeof(float) * static_cast<size_t>(from.n));
        }
      }
    });
  }
};

mx::array claim(const mx::array& a, mx::Stream stream) {
  return mx::array(a.shape(), a.dtype(), std::make_shared<ClaimCache>(stream), {a});
}

// Inputs q_nope, q_pe, latent, k_pe and, if masked, a mask [B, L, S].
class LatentAttendOp : public CpuPrimitive {
 public:
  LatentAttendOp(mx::Stream stream, std::shared_ptr<const LatentAttention::Held> held, bool causal, RowFormat format)
      : CpuPrimitive(stream), held_(std::move(held)), causal_(causal), format_(format) {}

  const char* name() const override {
    return "EdgeR1LatentAttention";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {{inputs[0].shape(0), inputs[0].shape(2), held_->plan.heads * held_->plan.value}};
  }
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    LatentCall call;
    call.batch = inputs[0].shape(0);
    call.length = inputs[0].shape(2);
    call.keys = inputs[2].shape(2);
    call.q_nope = latent_rows(inputs[0]);
    call.q_pe = latent_rows(inputs[1]);
    call.latent = latent_rows(inputs[2], format_);
    call.k_pe = latent_rows(inputs[3]);
    call.causal = causal_;
    if (inputs.size() > 4) {
      use_mask(inputs[4], call.keep, call.mask_strides);
    }
    call.out = outputs[0].data<float>();
    launch(stream(), [held = held_, call, caches = reading({inputs[2], inputs[3]}, stream()), index = stream().index] {
      ReadingDone done{caches, index};
      run_latent(held->plan, call);
    });
  }

 private:
  std::shared_ptr<const LatentAttention::Held> held_;
  bool causal_;
  RowFormat format_;
};

// Inputs x, latent, k_pe (claimed) and, if masked, a mask [B, L, S]; the result, and latent and k_pe for others to hand on.
class LatentLayerOp : public CpuPrimitive {
 public:
  LatentLayerOp(mx::Stream stream, std::shared_ptr<const LatentAttention::Held> held, std::shared_ptr<Written> written,
                int offset)
      : CpuPrimitive(stream), held_(std::move(held)), written_(std::move(written)), offset_(offset) {}

  const char* name() const override {
    return "EdgeR1LatentLayer";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const auto& x = inputs[0];
    allocate(outputs[0]);
    for (int i = 1; i < 3; i++) {
      mx::array cache(inputs[i].shape(), inputs[i].dtype(), nullptr, {});
      cache.copy_shared_buffer(inputs[i]);
      written_->caches.push_back(std::move(cache));
    }
    LatentLayerCall call;
    call.batch = x.shape(0);
    call.length = x.shape(1);
    call.out = outputs[0].data<float>();
    call.latent = written_->caches[0].data<float>();
    call.k_pe = written_->caches[1].data<float>();
    call.capacity = inputs[1].shape(2);
    call.offset = offset_;
    if (inputs.size() > 3) {
      use_mask(inputs[3], call.keep, call.mask_strides);
    }
    auto caches = reading(written_->caches, stream());
    launch(stream(), [held = held_, call, rows = Rows(x), caches, index = stream().index]() mutable {
      ReadingDone done{caches, index};
      // The result's place holds x as contiguous rows until it is overwritten at the very end.
      call.x = rows.data && rows.step == 1 && rows.map.uniform() ? static_cast<const float*>(rows.data) : call.out;
      call.x_stride = call.x == call.out ? rows.n : rows.map.stride();
      for (int64_t r = 0; call.x == call.out && r < rows.map.rows(); r++) {
        float* to = call.out + r * rows.n;
        const float* from = rows.fetch(r, to);
        if (from != to) {
          std::memcpy(to, from, sizeof(float) * static_cast<size_t>(rows.n));
        }
      }
      run_latent_layer(held->plan, call);
    });
  }

 private:
  std::shared_ptr<const LatentAttention::Held> held_;
  std::shared_ptr<Written> written_;
  int offset_;
};

} // namespace

mx::array LatentAttention::attend(const mx::array& q_nope, const mx::array& q_pe, const mx::array& latent,
                                  const mx::array& k_pe, const std::optional<mx::array>& mask, bool causal,
                                  RowFormat format) const {
  const auto& plan = held_->plan;
  mx::Stream stream = cpu_stream({}, "latent attention");
  auto refuse = [](const auto&... parts) {
    std::ostringstream out;
    out << "latent attention: ";
    (out << ... << parts);
    throw std::invalid_argument(out.str());
  };
  for (const auto* a : {&q_nope, &q_pe, &latent, &k_pe}) {
    bool typed = a == &latent && format.packed() ? a->dtype() == mx::uint32 && format.fits(plan.rank)
                                                 : is_float(a->dtype());
    if (a->ndim() != 4 || !typed) {
      refuse("an operand has ", a->ndim(), " axes and dtype ", a->dtype(), "; expected 4 and a float type");
    }
  }
  int batch = q_nope.shape(0), length = q_nope.shape(2), keys = latent.shape(2);
  bool fits = finished_ && q_nope.shape() == mx::Shape{batch, plan.heads, length, plan.nope} &&
      q_pe.shape() == mx::Shape{batch, plan.heads, length, plan.rope} &&
      latent.shape() == mx::Shape{batch, 1, keys, format.words(plan.rank)} &&
      k_pe.shape() == mx::Shape{batch, 1, keys, plan.rope} && batch > 0 && length > 0 && keys > 0 && (!causal || keys >= length);
  if (!fits) {
    refuse("queries ", q_nope.shape(), " and ", q_pe.shape(), ", latents ", latent.shape(), " and keys ", k_pe.shape(),
           "; expected [B, ", plan.heads, ", L, ", plan.nope, " and ", plan.rope, "], [B, 1, S, ", plan.rank, " and ",
           plan.rope, "]", causal ? " with S >= L" : "");
  }
  std::vector<mx::array> inputs{q_nope, q_pe, latent, k_pe};
  if (mask) {
    auto rows = row_mask(*mask, batch, length, keys, stream);
    if (!rows) {
      refuse("a mask ", mask->shape(), " of ", mask->dtype(), "; expected booleans that broadcast to [", batch, ", 1, ",
             length, ", ", keys, "]");
    }
    inputs.push_back(*rows);
  }
  return mx::array({batch, length, plan.heads * plan.value}, mx::float32,
                   std::make_shared<LatentAttendOp>(stream, held_, causal && !mask, format), std::move(inputs));
}

std::optional<std::tuple<mx::array, mx::array, mx::array>> LatentAttention::layer(
    const mx::array& x, const mx::array& latent, const mx::array& k_pe, int offset,
    const std::optional<mx::array>& mask) const {
  const auto& plan = held_->plan;
  mx::Stream stream = mx::default_stream(mx::default_device());
  if (!finished_ || !plan.whole || x.ndim() != 3 || x.dtype() != mx::float32 || x.size() == 0 ||
      x.shape(2) != plan.hidden || int64_t{x.shape(0)} * x.shape(1) > kMaxRows ||
      stream.device != mx::Device(mx::Device::cpu) || x.is_tracer() || latent.is_tracer() || k_pe.is_tracer() ||
      latent.dtype() != mx::float32 || k_pe.dtype() != mx::float32 || latent.ndim() != 4 || offset < 0) {
    return std::nullopt;
  }
  int batch = x.shape(0), length = x.shape(1), capacity = latent.shape(2);
  if (latent.shape() != mx::Shape{batch, 1, capacity, plan.rank} ||
      k_pe.shape() != mx::Shape{batch, 1, capacity, plan.rope} || capacity < offset + length) {
    return std::nullopt;
  }
  refuse_if_forked();
  std::vector<mx::array> inputs{x, claim(latent, stream), claim(k_pe, stream)};
  if (mask) {
    auto rows = row_mask(*mask, batch, length, offset + length, stream);
    if (!rows) {
      return std::nullopt;
    }
    inputs.push_back(*rows);
  }
  auto written = std::make_shared<Written>();
  mx::array out(x.shape(), mx::float32, std::make_shared<LatentLayerOp>(stream, held_, written, offset), std::move(inputs));
  return std::tuple(out, handed_on(out, latent, written, 0), handed_on(out, k_pe, written, 1));
}

} // namespace edger1
