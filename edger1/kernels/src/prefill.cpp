#include "prefill.h"

#include <cstring>
#include <limits>

#include "append.h"
#include "prefill_run.h"

namespace edger1 {
namespace {

PrefillCall call_for(const mx::array& x, int offset, int capacity) {
  PrefillCall call;
  call.batch = x.shape(0);
  call.length = x.shape(1);
  call.offset = offset;
  call.capacity = capacity;
  call.x = x.data<float>();
  return call;
}

// Inputs x and perhaps keys and values, claimed; outputs queries, keys, values.
class PrefillQueries : public CpuPrimitive {
 public:
  PrefillQueries(mx::Stream stream, std::shared_ptr<const DecoderPlan> plan, int offset, int capacity)
      : CpuPrimitive(stream), plan_(std::move(plan)), offset_(offset), capacity_(capacity) {}

  const char* name() const override {
    return "EdgeR1PrefillQueries";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return shapes(*plan_, inputs[0], capacity_);
  }
  static std::vector<mx::Shape> shapes(const DecoderPlan& plan, const mx::array& x, int capacity) {
    mx::Shape cache{x.shape(0), plan.kv_heads, capacity, plan.head_dim};
    return {{x.shape(0), plan.heads, x.shape(1), plan.head_dim}, cache, cache};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    bool fresh = inputs.size() == 1;
    allocate(outputs[0]);
    for (int i = 1; i < 3; i++) {
      if (fresh) {
        allocate(outputs[i]);
      } else {
        outputs[i].copy_shared_buffer(inputs[i]);
      }
    }
    PrefillCall call = call_for(inputs[0], offset_, capacity_);
    call.queries = outputs[0].data<float>();
    call.keys = outputs[1].data<float>();
    call.values = outputs[2].data<float>();
    launch(stream(), [plan = plan_, call, fresh] {
      if (fresh) {
        clear_rest(*plan, call);
      }
      prefill_queries(*plan, call);
    });
  }

 private:
  // What lies behind the new positions is zero, as mlx-lm's caches begin.
  static void clear_rest(const DecoderPlan& plan, const PrefillCall& call) {
    int64_t dim = plan.head_dim, room = (int64_t{call.capacity} - call.length) * dim;
    for (int64_t i = 0; i < int64_t{call.batch} * plan.kv_heads; i++) {
      int64_t begin = (i * call.capacity + call.length) * dim;
      std::memset(call.keys + begin, 0, sizeof(float) * static_cast<size_t>(room));
      std::memset(call.values + begin, 0, sizeof(float) * static_cast<size_t>(room));
    }
  }

  std::shared_ptr<const DecoderPlan> plan_;
  int offset_, capacity_;
};

// Inputs x, queries, keys, values; the output is the layer's.
class PrefillRest : public CpuPrimitive {
 public:
  PrefillRest(mx::Stream stream, std::shared_ptr<const DecoderPlan> plan, int offset)
      : CpuPrimitive(stream), plan_(std::move(plan)), offset_(offset) {}

  const char* name() const override {
    return "EdgeR1PrefillRest";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    PrefillCall call = call_for(inputs[0], offset_, inputs[2].shape(2));
    // They are only read from here on.
    call.queries = const_cast<float*>(inputs[1].data<float>());
    call.keys = const_cast<float*>(inputs[2].data<float>());
    call.values = const_cast<float*>(inputs[3].data<float>());
    call.out = outputs[0].data<float>();
    launch(stream(), [plan = plan_, call, caches = reading({inputs[2], inputs[3]}, stream()), index = stream().index] {
      ReadingDone done{caches, index};
      prefill_rest(*plan, call);
    });
  }

 private:
  std::shared_ptr<const DecoderPlan> plan_;
  int offset_;
};

} // namespace

std::optional<std::tuple<mx::array, mx::array, mx::array>> prefill_layer(const std::shared_ptr<const DecoderPlan>& plan,
                                                                         const mx::array& x,
                                                                         const std::optional<mx::array>& keys,
                                                                         const std::optional<mx::array>& values,
                                                                         int offset, int capacity) {
  mx::Stream stream = mx::default_stream(mx::default_device());
  if (!plan || !prefill_covers(*plan) || stream.device != mx::Device(mx::Device::cpu) || x.ndim() != 3 ||
      x.dtype() != mx::float32 || x.size() == 0 || x.shape(2) != plan->hidden || x.shape(1) <= kMaxRows ||
      int64_t{x.shape(0)} * x.shape(1) > std::numeric_limits<int>::max() / 2 || x.is_tracer() || offset < 0 ||
      keys.has_value() != values.has_value() || int64_t{offset} + x.shape(1) > capacity) {
    return std::nullopt;
  }
  auto shapes = PrefillQueries::shapes(*plan, x, capacity);
  auto rows = mx::contiguous(x, false, stream);
  std::vector<mx::array> inputs{rows};
  if (keys) {
    if (keys->shape() != shapes[1] || values->shape() != shapes[1] || keys->dtype() != mx::float32 ||
        values->dtype() != mx::float32 || keys->is_tracer() || values->is_tracer()) {
      return std::nullopt;
    }
    inputs.push_back(claim(*keys, stream));
    inputs.push_back(claim(*values, stream));
  } else if (offset != 0) {
    return std::nullopt;
  }
  refuse_if_forked();
  auto made = mx::array::make_arrays(shapes, {mx::float32, mx::float32, mx::float32},
                                     std::make_shared<PrefillQueries>(stream, plan, offset, capacity), std::move(inputs));
  auto out = mx::array(x.shape(), mx::float32, std::make_shared<PrefillRest>(stream, plan, offset),
                       {rows, made[0], made[1], made[2]});
  return std::tuple(out, made[1], made[2]);
}

} // namespace edger1
