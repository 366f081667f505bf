#include "packed_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "pool.h"
#include "primitive.h"

namespace edger1 {
namespace {

constexpr int kMostGroup = 128;
constexpr float kLargestHalf = 65504.0f;
// A float of which no bit is left for what lies behind the point: adding it and taking it away again rounds to the nearest
// whole number, and to the even one of two.
constexpr float kRounder = 12582912.0f;

void pack_group(uint8_t* codes, uint16_t* scale_to, uint16_t* bias_to, const float* from, RowFormat format) {
  float w[kMostGroup];
  uint16_t halves[kMostGroup];
  int n = format.group;
  for (int i = 0; i < n; i++) {
    w[i] = std::clamp(from[i], -kLargestHalf, kLargestHalf);
  }
  ops().from_f32(halves, Float::f16, w, n);
  ops().to_f32(w, halves, Float::f16, n);
  float least = std::numeric_limits<float>::infinity(), most = -least;
  for (int i = 0; i < n; i++) {
    least = std::min(least, w[i]);
    most = std::max(most, w[i]);
  }
  float bins = static_cast<float>((1 << format.bits) - 1);
  bool from_least = std::abs(least) > std::abs(most);
  float scale = std::max((most - least) / bins, 1e-7f), bias = 0;
  scale = from_least ? scale : -scale;
  float edge = from_least ? least : most, steps = std::rint(edge / scale);
  if (steps != 0) {
    scale = edge / steps;
    bias = edge;
  }
  for (int i = 0; i < n; i++) {
    w[i] = (std::clamp((w[i] - bias) / scale, 0.0f, bins) + kRounder) - kRounder;
  }
  if (format.bits == 8) {
    for (int i = 0; i < n; i++) {
      codes[i] = static_cast<uint8_t>(static_cast<int>(w[i]));
    }
  } else {
    for (int i = 0; i < n; i += 2) {
      codes[i / 2] = static_cast<uint8_t>(static_cast<int>(w[i]) | static_cast<int>(w[i + 1]) << 4);
    }
  }
  float pair[2] = {std::clamp(scale, -kLargestHalf, kLargestHalf), bias};
  uint16_t both[2];
  ops().from_f32(both, Float::f16, pair, 2);
  *scale_to = both[0];
  *bias_to = both[1];
}

// Input: rows of floats; output: the same packed.
class PackedRows : public CpuPrimitive {
 public:
  PackedRows(mx::Stream stream, RowFormat format) : CpuPrimitive(stream), format_(format) {}

  const char* name() const override {
    return "EdgeR1PackedRows";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape.back() = format_.words(shape.back());
    return {shape};
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return format_ == static_cast<const PackedRows&>(other).format_;
  }
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& out = outputs[0];
    allocate(out);
    Rows from(inputs[0]);
    int64_t row_bytes = int64_t{out.shape(-1)} * 4;
    launch(stream(), [from, to = out.data<char>(), row_bytes, format = format_] {
      parallel_ranges(from.map.rows(), grain_for(from.map.rows(), 16.0 * from.n, 65536), [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(static_cast<size_t>(from.n));
        for (int64_t r = begin; r < end; r++) {
          pack_row(to + r * row_bytes, from.fetch(r, scratch.data()), from.n, format);
        }
      });
    });
  }

 private:
  RowFormat format_;
};

} // namespace

void unpack_rows(float* out, const void* rows, int64_t stride, int n, int dim, RowFormat format) {
  auto* at = static_cast<const char*>(rows);
  for (int i = 0; i < n; i++) {
    dequantize_ops().row(out + int64_t{i} * dim, packed_row(at + i * stride * 4, dim, format), dim);
  }
}

void pack_row(void* to, const float* from, int dim, RowFormat format) {
  auto* codes = static_cast<uint8_t*>(to);
  auto* scales = reinterpret_cast<uint16_t*>(codes + dim * format.bits / 8);
  int groups = dim / format.group;
  for (int g = 0; g < groups; g++) {
    pack_group(codes + g * format.group * format.bits / 8, scales + g, scales + groups + g, from + g * format.group, format);
  }
}

mx::array packed_rows(const mx::array& x, int group, int bits, mx::StreamOrDevice s) {
  mx::Stream stream = cpu_stream(s, "packed_rows");
  RowFormat format{bits, group};
  if (x.ndim() < 1 || x.size() == 0 || !is_float(x.dtype()) || !format.fits(x.shape(-1))) {
    throw std::invalid_argument("packed_rows: expected rows of floats that divide into groups of 32, 64 or 128, and 4 or 8 bits");
  }
  mx::Shape shape = x.shape();
  shape.back() = format.words(shape.back());
  return mx::array(shape, mx::uint32, std::make_shared<PackedRows>(stream, format), {x});
}

} // namespace edger1
