#include "experts.h"

#include "ops_common.h"

namespace edger1 {
namespace {

using Shared = std::shared_ptr<const Experts::Held>;

mx::Shape rows_of(const mx::array& a, int inner) {
  return mx::Shape(a.shape().begin(), a.shape().end() - inner);
}

mx::Shape with(mx::Shape shape, std::initializer_list<int> more) {
  for (int size : more) {
    shape.push_back(size);
  }
  return shape;
}

int64_t row_count(const mx::array& x) {
  return static_cast<int64_t>(x.size()) / x.shape(-1);
}

// Rows of x for a call: where they lie if that is at one distance, else copied to `room`.
void take_rows(ExpertsCall& call, const Rows& x, std::vector<float>& room) {
  call.rows = x.map.rows();
  if (x.step == 1 && x.map.uniform()) {
    call.x = static_cast<const float*>(x.data);
    call.x_stride = x.map.stride();
    return;
  }
  room.resize(static_cast<size_t>(call.rows * x.n));
  for (int64_t r = 0; r < call.rows; r++) {
    float* to = &room[static_cast<size_t>(r * x.n)];
    const float* from = x.fetch(r, to);
    if (from != to) {
      std::copy_n(from, x.n, to);
    }
  }
  call.x = room.data();
  call.x_stride = x.n;
}

// A small strided array (indices, weights) as pointer and offsets, read when the operation runs.
template <class T>
struct Elements {
  const T* data = nullptr;
  std::vector<int64_t> offsets;

  explicit Elements(const mx::array& a) : data(a.data<T>()) {
    for_each_outer(a, 0, [&](int64_t offset) { offsets.push_back(offset); });
  }
  template <class To>
  std::vector<To> read() const {
    std::vector<To> values;
    values.reserve(offsets.size());
    for (int64_t offset : offsets) {
      values.push_back(static_cast<To>(data[offset]));
    }
    return values;
  }
};

// Inputs x, indices and, for a sum over ranks, weights.
class ExpertsOp : public CpuPrimitive {
 public:
  ExpertsOp(mx::Stream stream, Shared held, bool with_shared, std::shared_ptr<Arrivals> arrivals)
      : CpuPrimitive(stream), held_(std::move(held)), with_shared_(with_shared), arrivals_(std::move(arrivals)) {}

  const char* name() const override {
    return "EdgeR1Experts";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs.size() > 2 ? inputs[0].shape() : with(inputs[1].shape(), {held_->plan.hidden})};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    Rows x(inputs[0]);
    Elements<uint32_t> indices(inputs[1]);
    std::optional<Elements<float>> weights;
    if (inputs.size() > 2) {
      weights.emplace(inputs[2]);
    }
    float* out = outputs[0].data<float>();
    int ranks = inputs[1].shape(-1);
    launch(stream(), [held = held_, arrivals = arrivals_, with_shared = with_shared_, x, indices = std::move(indices),
                      weights = std::move(weights), out, ranks] {
      ExpertsCall call;
      std::vector<float> room, weight_values;
      take_rows(call, x, room);
      auto experts = indices.read<uint32_t>();
      if (weights) {
        weight_values = weights->read<float>();
        call.weights = weight_values.data();
      }
      call.ranks = ranks;
      call.experts = experts.data();
      call.with_shared = with_shared;
      call.arrivals = arrivals.get();
      call.out = out;
      run_experts(held->plan, call);
    });
  }

 private:
  Shared held_;
  bool with_shared_;
  std::shared_ptr<Arrivals> arrivals_;
};

// Inputs x, what each expert gave for it (contiguous), and weights.
class ExpertsSumOp : public CpuPrimitive {
 public:
  ExpertsSumOp(mx::Stream stream, Shared held) : CpuPrimitive(stream), held_(std::move(held)) {}

  const char* name() const override {
    return "EdgeR1ExpertsSum";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    launch(stream(), [held = held_, x = Rows(inputs[0]), given = inputs[1].data<float>(), ranks = inputs[1].shape(-2),
                      weights = Elements<float>(inputs[2]), out = outputs[0].data<float>()] {
      ExpertsCall call;
      std::vector<float> room;
      take_rows(call, x, room);
      auto weight_values = weights.read<float>();
      call.weights = weight_values.data();
      call.ranks = ranks;
      call.with_shared = held->plan.shared.present();
      call.out = out;
      sum_experts(held->plan, call, given);
    });
  }

 private:
  Shared held_;
};

// Input x. One output, the layer's; or, for the router alone, indices and weights.
class MoeLayerOp : public CpuPrimitive {
 public:
  enum class Part { layer, routed, router };

  MoeLayerOp(mx::Stream stream, Shared held, Part part) : CpuPrimitive(stream), held_(std::move(held)), part_(part) {}

  const char* name() const override {
    return "EdgeR1MoeLayer";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    if (part_ != Part::router) {
      return {inputs[0].shape()};
    }
    mx::Shape shape = with(rows_of(inputs[0], 1), {held_->plan.router.ranks});
    return {shape, shape};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    for (auto& out : outputs) {
      allocate(out);
    }
    Rows x(inputs[0]);
    if (part_ == Part::router) {
      auto* indices = outputs[0].data<uint32_t>();
      auto* weights = outputs[1].data<float>();
      launch(stream(), [held = held_, x, indices, weights] {
        ExpertsCall call;
        std::vector<float> room;
        take_rows(call, x, room);
        run_router(held->plan, call, indices, weights);
      });
      return;
    }
    launch(stream(), [held = held_, x, out = outputs[0].data<float>(), part = part_] {
      const ExpertsPlan& plan = held->plan;
      ExpertsCall call;
      std::vector<float> room;
      take_rows(call, x, room);
      call.ranks = plan.router.ranks;
      std::vector<uint32_t> experts(static_cast<size_t>(call.rows * call.ranks));
      std::vector<float> weights(experts.size());
      run_router(plan, call, experts.data(), weights.data());
      call.experts = experts.data();
      call.weights = weights.data();
      call.with_shared = part == Part::layer && plan.shared.present();
      call.out = out;
      run_experts(plan, call);
    });
  }

 private:
  Shared held_;
  Part part_;
};

} // namespace

std::optional<mx::array> Experts::operator()(const mx::array& x, const mx::array& indices,
                                             const std::optional<mx::array>& weights,
                                             std::shared_ptr<Arrivals> arrivals) const {
  return computed(x, indices, weights, false, std::move(arrivals));
}

std::optional<mx::array> Experts::given(const mx::array& x, const mx::array& indices, const mx::array& weights,
                                        std::shared_ptr<Arrivals> arrivals) const {
  bool shared = plan().shared.present();
  if (!applies(x) || (shared && row_count(x) > kMaxRows)) {
    return std::nullopt;
  }
  return computed(x, indices, weights, shared, std::move(arrivals));
}

std::optional<mx::array> Experts::computed(const mx::array& x, const mx::array& indices_in,
                                           const std::optional<mx::array>& weights, bool with_shared,
                                           std::shared_ptr<Arrivals> arrivals) const {
  if (!applies(x) || indices_in.ndim() != x.ndim() || !mx::issubdtype(indices_in.dtype(), mx::integer) ||
      rows_of(indices_in, 1) != rows_of(x, 1) || indices_in.size() == 0 || indices_in.is_tracer()) {
    return std::nullopt;
  }
  mx::Stream stream = cpu_stream(mx::Device::cpu, "experts");
  bool plain = indices_in.dtype() == mx::uint32;
  mx::array indices = plain ? indices_in
      : indices_in.dtype() == mx::int32 ? mx::view(indices_in, mx::uint32, stream)
                                        : mx::astype(indices_in, mx::uint32, stream);
  auto op = std::make_shared<ExpertsOp>(stream, held_, with_shared, std::move(arrivals));
  if (!weights) {
    return mx::array(with(indices.shape(), {plan().hidden}), mx::float32, std::move(op), {x, indices});
  }
  bool fits = weights->shape() == indices.shape() || weights->shape() == with(indices.shape(), {1});
  if (!fits || weights->dtype() != mx::float32 || weights->is_tracer()) {
    return std::nullopt;
  }
  return mx::array(x.shape(), mx::float32, std::move(op), {x, indices, *weights});
}

std::optional<mx::array> Experts::summed(const mx::array& x, const mx::array& ranks, const mx::array& weights) const {
  if (!applies(x) || (plan().shared.present() && row_count(x) > kMaxRows) || weights.ndim() != x.ndim() ||
      rows_of(weights, 1) != rows_of(x, 1) || ranks.shape() != with(weights.shape(), {plan().hidden}) ||
      ranks.dtype() != mx::float32 || weights.dtype() != mx::float32 || ranks.size() == 0 || ranks.is_tracer() ||
      weights.is_tracer()) {
    return std::nullopt;
  }
  mx::Stream stream = cpu_stream(mx::Device::cpu, "experts");
  return mx::array(x.shape(), mx::float32, std::make_shared<ExpertsSumOp>(stream, held_),
                   {x, mx::contiguous(ranks, false, stream), weights});
}

std::optional<mx::array> Experts::layer(const mx::array& x) const {
  if (!applies(x) || !plan().routes_here() || (plan().shared.present() && row_count(x) > kMaxRows)) {
    return std::nullopt;
  }
  mx::Stream stream = cpu_stream(mx::Device::cpu, "experts");
  return mx::array(x.shape(), mx::float32, std::make_shared<MoeLayerOp>(stream, held_, MoeLayerOp::Part::layer), {x});
}

std::optional<mx::array> Experts::routed(const mx::array& x) const {
  if (!applies(x) || !plan().routes_here()) {
    return std::nullopt;
  }
  mx::Stream stream = cpu_stream(mx::Device::cpu, "experts");
  return mx::array(x.shape(), mx::float32, std::make_shared<MoeLayerOp>(stream, held_, MoeLayerOp::Part::routed), {x});
}

std::optional<std::pair<mx::array, mx::array>> Experts::route(const mx::array& x) const {
  if (!applies(x) || plan().router.ranks == 0) {
    return std::nullopt;
  }
  mx::Stream stream = cpu_stream(mx::Device::cpu, "experts");
  mx::Shape shape = with(rows_of(x, 1), {plan().router.ranks});
  auto outputs = mx::array::make_arrays({shape, shape}, {mx::uint32, mx::float32},
                                        std::make_shared<MoeLayerOp>(stream, held_, MoeLayerOp::Part::router), {x});
  return std::pair(outputs[0], outputs[1]);
}

} // namespace edger1
