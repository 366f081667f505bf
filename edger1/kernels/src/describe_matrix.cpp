#include "describe_matrix.h"

#include <sstream>
#include <stdexcept>

namespace edger1 {
namespace {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  throw std::invalid_argument(out.str());
}

} // namespace

ScaleType scale_type(mx::Dtype dtype) {
  return dtype == mx::float32 ? ScaleType::f32 : dtype == mx::float16 ? ScaleType::f16 : ScaleType::bf16;
}

int64_t bytes_of(ScaleType type) {
  return type == ScaleType::f32 ? 4 : type == ScaleType::e8m0 ? 1 : 2;
}

Projection quantized_form(const std::string& what, int64_t n, int64_t k, ScaleType type, const Quantization& q) {
  bool fp4 = q.mode == "mxfp4";
  bool known = fp4 ? q.bits == 4 && q.group_size == 32
                   : q.mode == "affine" && ((q.bits >= 2 && q.bits <= 6) || q.bits == 8) &&
                         (q.group_size == 32 || q.group_size == 64 || q.group_size == 128);
  if (!known) {
    refuse(what, ": quantization ", q.mode, ", ", q.bits, " bits in groups of ", q.group_size, ", is not one of the kernels'");
  }
  if (n < 1 || k < 1 || k > (1 << 24) || k % q.group_size != 0) {
    refuse(what, " is [", n, ", ", k, "]; expected whole groups of ", q.group_size, " columns");
  }
  Projection p;
  p.quantized = true;
  p.n = p.w.n = static_cast<int>(n);
  p.k = p.w.k = static_cast<int>(k);
  p.w.group = q.group_size;
  p.w.bits = q.bits;
  p.w.fp4 = fp4;
  p.w.type = fp4 ? ScaleType::e8m0 : type;
  p.w.row_bytes = k * q.bits / 8;
  p.w.scale_stride = k / q.group_size * bytes_of(p.w.type);
  p.w.bias_stride = fp4 ? 0 : p.w.scale_stride;
  return p;
}

Projection plain_form(int64_t n, int64_t k, mx::Dtype type) {
  Projection p;
  p.n = static_cast<int>(n);
  p.k = static_cast<int>(k);
  p.plain_type = float_of(type);
  p.plain_stride = k;
  return p;
}

Projection form_of(const std::string& what, int64_t n, const mx::array& w, const std::optional<mx::array>& scales,
                   const std::optional<mx::array>& biases, const Quantization& q) {
  if (!scales) {
    if (!is_float(w.dtype())) {
      refuse(what, " has dtype ", w.dtype(), "; expected float32, float16 or bfloat16, or codes with scales");
    }
    return plain_form(n, w.shape(-1), w.dtype());
  }
  int64_t code_bits = int64_t{w.shape(-1)} * 32;
  if (w.dtype() != mx::uint32 || q.bits < 1 || code_bits % q.bits != 0) {
    refuse(what, ": codes have dtype ", w.dtype(), " and shape ", w.shape(), "; expected packed uint32 of ", q.bits, " bits");
  }
  Projection p = quantized_form(what, n, code_bits / q.bits, scale_type(scales->dtype()), q);
  mx::Shape expected = w.shape();
  expected.back() = p.k / q.group_size;
  bool scales_fit =
      scales->shape() == expected && (p.w.fp4 ? scales->dtype() == mx::uint8 : is_float(scales->dtype()));
  bool biases_fit = p.w.fp4 ? !biases : biases && biases->shape() == expected && biases->dtype() == scales->dtype();
  if (!scales_fit || !biases_fit) {
    refuse(what, ": scales or biases do not fit codes of shape ", w.shape(), ", ", q.mode, " ", q.bits, " bits in groups of ",
           q.group_size, "; expected shape ", expected);
  }
  return p;
}

mx::array KeptArrays::keep(const mx::array& a) {
  mx::array kept = a;
  kept.eval();
  if (!kept.flags().row_contiguous) {
    kept = mx::contiguous(kept, false, mx::Device::cpu);
    kept.eval();
  }
  arrays_.push_back(kept);
  return kept;
}

const float* KeptArrays::keep_floats(const std::string& what, const mx::array& a, const mx::Shape& shape) {
  if (!is_float(a.dtype()) || a.shape() != shape) {
    refuse(what, " has shape ", a.shape(), " and dtype ", a.dtype(), "; expected floats of shape ", shape);
  }
  return keep(mx::astype(a, mx::float32, mx::Device::cpu)).data<float>();
}

Projection KeptArrays::keep_matrix(const std::string& what, int64_t n, const mx::array& w,
                                   const std::optional<mx::array>& scales, const std::optional<mx::array>& biases,
                                   const Quantization& q) {
  Projection p = form_of(what, n, w, scales, biases, q);
  mx::array codes = keep(w);
  if (p.quantized) {
    p.w.codes = codes.data<uint8_t>();
    p.w.scales = keep(*scales).data<void>();
    p.w.biases = biases ? keep(*biases).data<void>() : nullptr;
  } else {
    p.plain = codes.data<void>();
  }
  return p;
}

} // namespace edger1
