#include "rope.h"

#include <cmath>
#include <cstring>
#include <deque>
#include <memory>

#include "mlx/fast.h"

namespace edger1 {

float inverse_frequency(float base, int i, int half) {
  return static_cast<float>(
      std::exp(static_cast<double>(static_cast<float>(-i) * (std::log(base) / static_cast<float>(half)))));
}

// All layers of a model rotate by the same angles, queries and keys alike: the last few tables are kept, one list a thread.
std::shared_ptr<const Angles> angles_for(int offset, int length, float scale, const std::vector<float>& inverse_freqs) {
  static thread_local std::deque<std::shared_ptr<const Angles>> recent;
  for (size_t i = 0; i < recent.size(); i++) {
    const auto& a = *recent[i];
    if (a.offset == offset && a.length == length && a.scale == scale && a.inverse_freqs == inverse_freqs) {
      auto found = recent[i];
      if (i > 4) {
        recent.erase(recent.begin() + static_cast<std::ptrdiff_t>(i));
        recent.push_front(found);
      }
      return found;
    }
  }
  auto made = std::make_shared<Angles>(Angles{offset, length, scale, inverse_freqs, {}});
  size_t half = inverse_freqs.size();
  made->table.resize(2 * half * static_cast<size_t>(length));
  float* cosines = made->table.data();
  float* sines = cosines + half * static_cast<size_t>(length);
  parallel_ranges(length, grain_for(length, 20.0 * static_cast<double>(half), 8192), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      // The order of MLX: the position is scaled first, all in float.
      float position = (static_cast<float>(t) + static_cast<float>(offset)) * scale;
      for (size_t i = 0; i < half; i++) {
        float theta = position * inverse_freqs[i];
        cosines[t * half + i] = std::cos(theta);
        sines[t * half + i] = std::sin(theta);
      }
    }
  });
  size_t keep = length > 64 ? 4 : 32;
  while (recent.size() >= keep) {
    recent.pop_back();
  }
  recent.push_front(made);
  return made;
}

namespace {

struct RopeKind {
  int dims;
  bool traditional;
  std::optional<float> base;
  float scale;
  bool inverse;
  bool operator==(const RopeKind&) const = default;
};

// Inputs x, offset (int32, one or B elements) and freqs unless there is a base.
class Rope : public DensePrimitive {
 public:
  Rope(mx::Stream s, RopeKind kind, int offset, bool has_offset_array)
      : DensePrimitive(s), kind_(kind), offset_(offset), has_offset_array_(has_offset_array) {}

  const char* name() const override {
    return "EdgeR1Rope";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const Rope&>(other);
    return kind_ == o.kind_ && offset_ == o.offset_ && has_offset_array_ == o.has_offset_array_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    mx::Stream s = stream();
    std::optional<mx::array> freqs = kind_.base ? std::nullopt : std::optional(in.back());
    mx::array offset = has_offset_array_ ? in[1] : mx::array(offset_);
    if (!kind_.inverse) {
      return {mx::fast::rope(in[0], kind_.dims, kind_.traditional, kind_.base, kind_.scale, offset, freqs, s)};
    }
    // Backwards: negative frequencies turn every angle around.
    if (!freqs) {
      float step = std::log(*kind_.base) / static_cast<float>(kind_.dims / 2);
      freqs = mx::exp(mx::multiply(mx::arange(0, kind_.dims / 2, 1, mx::float32, s), mx::array(step), s), s);
    }
    return {mx::fast::rope(in[0], kind_.dims, kind_.traditional, std::nullopt, kind_.scale, offset,
                           mx::negative(*freqs, s), s)};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const auto& x_in = inputs[0];
    allocate_or_reuse(x_in, outputs[0]);
    Rows x(x_in);
    OutRows out(outputs[0]);
    int length = x_in.shape(-2), batch = x_in.shape(0);
    const int32_t* offsets = has_offset_array_ ? inputs[1].data<int32_t>() : nullptr;
    int64_t offset_stride = has_offset_array_ && inputs[1].size() > 1 ? inputs[1].strides(0) : 0;
    const void* freqs = nullptr;
    int64_t freq_stride = 1;
    if (!kind_.base) {
      freqs = inputs.back().data<void>();
      freq_stride = inputs.back().strides(0);
    }
    launch(stream(), [=, kind = kind_, offset = offset_] {
      int half = kind.dims / 2, n = x.n;
      std::vector<float> inverse_freqs(static_cast<size_t>(half));
      for (int i = 0; i < half; i++) {
        inverse_freqs[i] =
            freqs ? 1.0f / static_cast<const float*>(freqs)[i * freq_stride] : inverse_frequency(*kind.base, i, half);
      }
      int64_t rows = x.map.rows(), per_batch = rows / batch;
      std::vector<std::shared_ptr<const Angles>> angles;
      for (int b = 0; b < (offset_stride ? batch : 1); b++) {
        angles.push_back(angles_for(offsets ? offsets[b * offset_stride] : offset, length, kind.scale, inverse_freqs));
      }
      parallel_ranges(rows, grain_for(rows, n, 16384), [&](int64_t begin, int64_t end) {
        auto* scratch = static_cast<float*>(thread_scratch(0, sizeof(float) * 2 * static_cast<size_t>(n)));
        for (int64_t r = begin; r < end; r++) {
          const auto& table = *angles[offset_stride ? r / per_batch : 0];
          int t = static_cast<int>(r % length);
          float* to = out.place(r, scratch);
          const float* from = x.fetch(r, scratch + n);
          ops().rope(to, from, table.cosines(t), table.sines(t), half, kind.traditional, kind.inverse);
          if (kind.dims < n && to != from) {
            std::memcpy(to + kind.dims, from + kind.dims, sizeof(float) * static_cast<size_t>(n - kind.dims));
          }
          out.finish(r, to);
        }
      });
    });
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    std::vector<mx::array> gradients;
    for (int arg : argnums) {
      if (arg != 0) {
        throw std::invalid_argument("rope has a gradient for its input only, not for offsets or frequencies");
      }
      RopeKind back = kind_;
      back.inverse = !back.inverse;
      std::vector<mx::array> inputs = primals;
      inputs[0] = cotangents[0];
      gradients.push_back(mx::array(primals[0].shape(), primals[0].dtype(),
                                    std::make_shared<Rope>(stream(), back, offset_, has_offset_array_), inputs));
    }
    return gradients;
  }

 private:
  RopeKind kind_;
  int offset_;
  bool has_offset_array_;
};

} // namespace

mx::array rope(const mx::array& x, int dims, bool traditional, std::optional<float> base, float scale,
               const std::variant<int, mx::array>& offset, const std::optional<mx::array>& freqs,
               mx::StreamOrDevice s) {
  const auto* offsets = std::get_if<mx::array>(&offset);
  bool ours = on_cpu(s) && is_float(x.dtype()) && x.ndim() >= 3 && x.ndim() <= RowMap::kMaxAxes && x.size() > 0 &&
      dims > 0 && dims % 2 == 0 && dims <= x.shape(-1) && base.has_value() != freqs.has_value() &&
      (!freqs || (freqs->ndim() == 1 && freqs->shape(0) == dims / 2)) &&
      (!offsets || (mx::issubdtype(offsets->dtype(), mx::integer) && offsets->ndim() <= 1 &&
                    (offsets->size() == 1 || static_cast<int>(offsets->size()) == x.shape(0))));
  if (!ours) {
    return offsets ? mx::fast::rope(x, dims, traditional, base, scale, *offsets, freqs, s)
                   : mx::fast::rope(x, dims, traditional, base, scale, std::get<int>(offset), freqs, s);
  }
  mx::Stream stream = mx::to_stream(s);
  std::vector<mx::array> inputs{x};
  if (offsets) {
    inputs.push_back(mx::astype(*offsets, mx::int32, stream));
  }
  if (freqs) {
    inputs.push_back(mx::astype(*freqs, mx::float32, stream));
  }
  auto primitive = std::make_shared<Rope>(stream, RopeKind{dims, traditional, base, scale, false},
                                          offsets ? 0 : std::get<int>(offset), offsets != nullptr);
  return mx::array(x.shape(), x.dtype(), primitive, std::move(inputs));
}

} // namespace edger1
