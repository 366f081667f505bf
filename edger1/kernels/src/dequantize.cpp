#include "dequantize.h"

#include <memory>
#include <sstream>

namespace edger1 {

const DequantizeOps& dequantize_ops() {
#if defined(__x86_64__)
  static const DequantizeOps& table =
      table_for_isa<DequantizeOps>(&dequantize_portable, &dequantize_avx2, &dequantize_avx512vnni, nullptr);
#elif defined(__aarch64__)
  static const DequantizeOps& table = table_for_isa<DequantizeOps>(&dequantize_portable, nullptr, nullptr, &dequantize_neon);
#else
  static const DequantizeOps& table = dequantize_portable;
#endif
  return table;
}

namespace {

// Inputs: indices (int32 or uint32, contiguous), w, scales and, but for mxfp4, biases; all but the indices contiguous.
class DequantizedRows : public DensePrimitive {
 public:
  DequantizedRows(mx::Stream s, int group, int bits, bool mxfp4) : DensePrimitive(s), group_(group), bits_(bits), mxfp4_(mxfp4) {}

  const char* name() const override {
    return "EdgeR1DequantizedRows";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& that = static_cast<const DequantizedRows&>(other);
    return group_ == that.group_ && bits_ == that.bits_ && mxfp4_ == that.mxfp4_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape.push_back(inputs[1].shape(1) * 32 / bits_);
    return {shape};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    mx::Stream s = stream();
    auto rows = [&](const mx::array& a) { return mx::take(a, in[0], 0, s); };
    if (mxfp4_) {
      return {mx::dequantize(rows(in[1]), rows(in[2]), std::nullopt, group_, bits_, "mxfp4", std::nullopt, mx::float32, s)};
    }
    auto wide = [&](const mx::array& a) { return mx::astype(rows(a), mx::float32, s); };
    return {mx::dequantize(rows(in[1]), wide(in[2]), wide(in[3]), group_, bits_, "affine", std::nullopt, std::nullopt, s)};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    const auto &indices = inputs[0], &w = inputs[1], &scales = inputs[2];
    int64_t count = static_cast<int64_t>(indices.size()), rows = w.shape(0), columns = w.shape(1) * 32LL / bits_;
    int64_t code_bytes = w.shape(1) * 4LL, groups = scales.shape(1);
    QuantizedRow first{reinterpret_cast<const uint8_t*>(w.data<uint32_t>()),
                       scales.data<void>(),
                       mxfp4_ ? nullptr : inputs[3].data<void>(),
                       float_of(scales.dtype()),
                       group_,
                       bits_,
                       mxfp4_};
    const auto* at = indices.data<int32_t>();
    bool is_signed = indices.dtype() == mx::int32;
    auto* out = outputs[0].data<float>();
    launch(stream(), [=] {
      parallel_ranges(count, grain_for(count, static_cast<double>(columns), 16384), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          int64_t r = is_signed ? int64_t{at[i]} : int64_t{static_cast<uint32_t>(at[i])};
          r = is_signed && r < 0 ? r + rows : r;
          if (r < 0 || r >= rows) {
            throw std::out_of_range("an index is beyond the rows of the embedding");
          }
          QuantizedRow row = first;
          int64_t group = r * groups;
          row.codes += r * code_bytes;
          row.scales = first.mxfp4 ? static_cast<const char*>(first.scales) + group : offset(first.scales, first.type, group);
          row.biases = first.mxfp4 ? nullptr : offset(first.biases, first.type, group);
          dequantize_ops().row(out + i * columns, row, columns);
        }
      });
    });
  }

 private:
  int group_, bits_;
  bool mxfp4_;
};

} // namespace

int quantized_columns(const char* what, const mx::array& w, const mx::array& scales,
                      const std::optional<mx::array>& biases, int group, int bits, const std::string& mode) {
  auto fail = [&](const std::string& why) { throw std::invalid_argument(std::string(what) + ": " + why); };
  bool affine = mode == "affine";
  bool format = affine ? (bits >= 2 && bits <= 8 && bits != 7 && (group == 32 || group == 64 || group == 128))
                       : mode == "mxfp4" && bits == 4 && group == 32;
  if (!format) {
    fail("got mode " + mode + " with " + std::to_string(bits) + " bits in groups of " + std::to_string(group) +
         ", expected affine with 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, or mxfp4");
  }
  if (w.dtype() != mx::uint32 || w.ndim() < 1 || scales.ndim() != w.ndim() || biases.has_value() != affine) {
    fail("expected codes in uint32 and scales of as many axes" + std::string(affine ? ", and biases" : ", and no biases"));
  }
  if (affine ? !is_float(scales.dtype()) || biases->dtype() != scales.dtype() || biases->shape() != scales.shape()
             : scales.dtype() != mx::uint8) {
    fail(affine ? "expected scales and biases of one float type and shape" : "expected scales in uint8");
  }
  int64_t columns = w.shape(-1) * 32LL / bits;
  mx::Shape expected = w.shape();
  expected[expected.size() - 1] = static_cast<int>(columns / group);
  if (columns % group != 0 || columns * bits != w.shape(-1) * 32LL || scales.shape() != expected) {
    std::ostringstream given;
    given << "codes of shape " << w.shape() << " do not go with scales of shape " << scales.shape() << " in groups of " << group;
    fail(given.str());
  }
  return static_cast<int>(columns);
}

mx::array dequantized_rows(const mx::array& w, const mx::array& scales, const std::optional<mx::array>& biases,
                           const mx::array& indices, int group, int bits, const std::string& mode,
                           mx::StreamOrDevice s) {
  mx::Stream stream = cpu_stream(s, "dequantized_rows");
  int columns = quantized_columns("dequantized_rows", w, scales, biases, group, bits, mode);
  if (w.ndim() != 2 || !mx::issubdtype(indices.dtype(), mx::integer)) {
    throw std::invalid_argument("dequantized_rows takes a matrix of codes and indices of an integer type");
  }
  bool plain = indices.dtype() == mx::uint32 || indices.dtype() == mx::int32;
  // Weights usually are evaluated and contiguous: a node less in the graph for each.
  auto whole = [&](const mx::array& a) {
    return a.is_available() && a.flags().row_contiguous ? a : mx::contiguous(a, false, stream);
  };
  std::vector<mx::array> inputs{whole(plain ? indices : mx::astype(indices, mx::int32, stream)), whole(w), whole(scales)};
  if (biases) {
    inputs.push_back(whole(*biases));
  }
  mx::Shape shape = indices.shape();
  shape.push_back(columns);
  return mx::array(shape, mx::float32, std::make_shared<DequantizedRows>(stream, group, bits, mode == "mxfp4"),
                   std::move(inputs));
}

} // namespace edger1
