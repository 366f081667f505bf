#include "decoder_stack.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "append.h"
#include "hand_on.h"
#include "ops_common.h"

namespace edger1 {

// Inputs: x, each layer's keys and values, starts where there are any, and what is to be evaluated before.
class DecoderStackOp : public CpuPrimitive {
 public:
  DecoderStackOp(mx::Stream stream, std::shared_ptr<const DecoderStack::Held> held, std::shared_ptr<Written> written,
                 std::vector<int> offsets, bool has_starts, RowFormat format)
      : CpuPrimitive(stream), held_(std::move(held)), written_(std::move(written)), offsets_(std::move(offsets)),
        has_starts_(has_starts), format_(format) {}

  const char* name() const override {
    return "EdgeR1DecoderStack";
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const auto& x = inputs[0];
    allocate(outputs[0]);
    Task task{held_, {}, {}, Rows(x), outputs[0].data<float>(), nullptr, 0, stream().index};
    for (size_t layer = 0; layer < offsets_.size(); layer++) {
      DecoderCall call;
      call.batch = x.shape(0);
      call.length = x.shape(1);
      call.x = call.out = task.out;
      call.x_stride = x.shape(2);
      call.offset = offsets_[layer];
      call.order.capacity = inputs[1 + 2 * layer].shape(2);
      call.cache_type = format_.packed() ? Float::f32 : float_of(inputs[1 + 2 * layer].dtype());
      call.format = format_;
      call.keys = claim(inputs[1 + 2 * layer]);
      call.values = claim(inputs[2 + 2 * layer]);
      task.calls.push_back(call);
    }
    if (has_starts_) {
      const auto& starts = inputs[1 + 2 * offsets_.size()];
      task.starts = starts.data<int32_t>();
      task.start_stride = starts.strides(0);
    }
    task.caches = reading(written_->caches, stream());
    launch(stream(), [task = std::move(task)]() mutable { task(); });
  }

 private:
  struct Task {
    std::shared_ptr<const DecoderStack::Held> held;
    std::vector<DecoderCall> calls;
    std::vector<const void*> caches;
    Rows x;
    float* out;
    const int32_t* starts;
    int64_t start_stride;
    int stream;

    void operator()() {
      ReadingDone done{caches, stream};
      for (int64_t r = 0; r < x.map.rows(); r++) {
        float* to = out + r * x.n;
        const float* from = x.fetch(r, to);
        if (from != to) {
          std::memcpy(to, from, sizeof(float) * static_cast<size_t>(x.n));
        }
      }
      // All layers have the same starts, and hold as much.
      int first_slots[kMaxRows];
      for (int b = 0; starts && b < calls[0].batch; b++) {
        first_slots[b] = std::clamp(starts[b * start_stride], 0, calls[0].offset + calls[0].length - 1);
      }
      std::vector<const DecoderPlan*> plans;
      for (size_t i = 0; i < calls.size(); i++) {
        calls[i].first_slots = starts ? first_slots : nullptr;
        plans.push_back(&held->layers[i]->plan);
      }
      run_decoder_layers(plans.data(), calls.data(), static_cast<int>(plans.size()));
      for (int64_t r = 0; held->norm.weight && r < x.map.rows(); r++) {
        ops().rms_norm(out + r * x.n, out + r * x.n, held->norm.weight, static_cast<int>(x.n), held->norm.eps);
      }
    }
  };

  // The buffer to write a cache in: its own where nobody else holds it, else a copy's.
  void* claim(const mx::array& cache) {
    mx::array out(cache.shape(), cache.dtype(), nullptr, {});
    if (cache.flags().row_contiguous && cache.data_size() == cache.size() && sole_holder(cache, stream())) {
      out.copy_shared_buffer(cache);
    } else {
      allocate(out);
      mx::cpu::get_command_encoder(stream()).add_temporary(out);
      int64_t row_bytes = int64_t{cache.shape(-1)} * static_cast<int64_t>(cache.itemsize());
      launch(stream(), [from = cache.data<char>(), to = out.data<char>(), place = RowMap(cache, 1), row_bytes,
                        step = cache.strides(-1), columns = cache.shape(-1), size = static_cast<int64_t>(cache.itemsize())] {
        parallel_ranges(place.rows(), grain_for(place.rows(), static_cast<double>(row_bytes), 65536),
                        [&](int64_t begin, int64_t end) {
                          for (int64_t r = begin; r < end; r++) {
                            for (int i = 0; i < (step == 1 ? 1 : columns); i++) {
                              std::memcpy(to + r * row_bytes + i * size, from + (place(r) + i * step) * size,
                                          static_cast<size_t>(step == 1 ? row_bytes : size));
                            }
                          }
                        });
      });
    }
    written_->caches.push_back(out);
    return out.data<void>();
  }

  std::shared_ptr<const DecoderStack::Held> held_;
  std::shared_ptr<Written> written_;
  std::vector<int> offsets_;
  bool has_starts_;
  RowFormat format_;
};

DecoderStack::DecoderStack(const std::vector<const DecoderLayer*>& layers, const std::optional<mx::array>& norm, float eps)
    : held_(std::make_shared<Held>()) {
  for (const DecoderLayer* layer : layers) {
    if (!layer->finished_ || !layer->held_->plan.has_mlp || !layer->held_->plan.residual ||
        layer->held_->plan.hidden != layers[0]->held_->plan.hidden) {
      throw std::invalid_argument("decoder stack: its layers must be finished, whole, and of one width");
    }
    held_->layers.push_back(layer->held_);
  }
  if (layers.empty()) {
    throw std::invalid_argument("decoder stack: it has no layers; expected one or more");
  }
  if (norm) {
    mx::array weight = mx::contiguous(mx::astype(*norm, mx::float32, mx::Device::cpu), false, mx::Device::cpu);
    if (weight.ndim() != 1 || weight.shape(0) != layers[0]->held_->plan.hidden) {
      throw std::invalid_argument("decoder stack: the last norm is not as wide as the layers");
    }
    weight.eval();
    held_->arrays.push_back(weight);
    held_->norm.weight = weight.data<float>();
    held_->norm.eps = eps;
  }
}

bool DecoderStack::applies(const mx::array& x, const StackCaches& caches) const {
  mx::Stream stream = mx::default_stream(mx::default_device());
  size_t layers = held_->layers.size();
  int hidden = held_->layers[0]->plan.hidden;
  if (x.ndim() != 3 || x.dtype() != mx::float32 || x.size() == 0 || x.shape(2) != hidden ||
      int64_t{x.shape(0)} * x.shape(1) > kMaxRows || stream.device != mx::Device(mx::Device::cpu) || x.is_tracer() ||
      caches.keys.size() != layers || caches.values.size() != layers || caches.offsets.size() != layers) {
    return false;
  }
  for (size_t i = 0; i < layers; i++) {
    const auto& plan = held_->layers[i]->plan;
    for (const auto* cache : {&caches.keys[i], &caches.values[i]}) {
      bool packed = caches.format.packed();
      bool typed = packed ? cache->dtype() == mx::uint32 && caches.format.fits(plan.head_dim)
                          : cache->dtype() == mx::float32 || cache->dtype() == mx::float16;
      if (cache->ndim() != 4 || !typed || cache->dtype() != caches.keys[i].dtype() || cache->is_tracer() ||
          cache->shape() != mx::Shape{x.shape(0), plan.kv_heads, caches.keys[i].shape(2), caches.format.words(plan.head_dim)}) {
        return false;
      }
    }
    if (caches.offsets[i] < 0) {
      return false;
    }
  }
  return !caches.starts || (caches.starts->shape() == mx::Shape{x.shape(0)} && caches.starts->dtype() == mx::int32);
}

std::optional<DecoderStack::Result> DecoderStack::operator()(const mx::array& x, const StackCaches& caches) const {
  if (!applies(x, caches)) {
    return std::nullopt;
  }
  mx::Stream stream = mx::default_stream(mx::default_device());
  size_t layers = held_->layers.size();
  std::vector<mx::array> inputs{x};
  inputs.reserve(2 * layers + 2 + caches.after.size());
  for (size_t i = 0; i < layers; i++) {
    if (int64_t{caches.offsets[i]} + x.shape(1) > caches.keys[i].shape(2)) {
      return std::nullopt;
    }
    inputs.push_back(caches.keys[i]);
    inputs.push_back(caches.values[i]);
  }
  if (caches.starts) {
    inputs.push_back(*caches.starts);
  }
  inputs.insert(inputs.end(), caches.after.begin(), caches.after.end());
  refuse_if_forked();
  auto written = std::make_shared<Written>();
  auto op = std::make_shared<DecoderStackOp>(stream, held_, written, caches.offsets, caches.starts.has_value(),
                                             caches.format);
  Result result{mx::array(x.shape(), mx::float32, std::move(op), std::move(inputs)), {}, {}};
  for (size_t i = 0; i < layers; i++) {
    result.keys.push_back(handed_on(result.out, caches.keys[i], written, 2 * i));
    result.values.push_back(handed_on(result.out, caches.values[i], written, 2 * i + 1));
  }
  return result;
}

} // namespace edger1
