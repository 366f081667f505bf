// A model's matrices as the kernels' projections: what describing a decoder layer, experts and latent attention has in
// common. Each function throws std::invalid_argument, with `what` first, then what was found and expected.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "decoder_plan.h"
#include "ops_common.h"

namespace edger1 {

struct Quantization {
  int group_size = 64;
  int bits = 4;
  std::string mode = "affine";
};

// Of scales and biases, which are not mxfp4's.
ScaleType scale_type(mx::Dtype dtype);
int64_t bytes_of(ScaleType type);

// A matrix [n, k] whose rows follow each other without gaps, its pointers null: quantized, with scales of `type` (but for
// mxfp4, which has its own), or plain.
Projection quantized_form(const std::string& what, int64_t n, int64_t k, ScaleType type, const Quantization& q);
Projection plain_form(int64_t n, int64_t k, mx::Dtype type);

// The same of w [..., k], plain floats or codes as mx.quantize packs them if there are scales [..., k / group], as a matrix
// of n rows.
Projection form_of(const std::string& what, int64_t n, const mx::array& w, const std::optional<mx::array>& scales,
                   const std::optional<mx::array>& biases, const Quantization& q);

// Arrays that a description needs as long as it lives.
class KeptArrays {
 public:
  // The array evaluated and without gaps: itself, if it has none.
  mx::array keep(const mx::array& a);
  // The array, of floats of that shape, in f32.
  const float* keep_floats(const std::string& what, const mx::array& a, const mx::Shape& shape);
  // form_of() with pointers into the arrays, which are kept.
  Projection keep_matrix(const std::string& what, int64_t n, const mx::array& w, const std::optional<mx::array>& scales,
                         const std::optional<mx::array>& biases, const Quantization& q);

 private:
  std::vector<mx::array> arrays_;
};

} // namespace edger1
