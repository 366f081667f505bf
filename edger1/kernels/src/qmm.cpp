#include "qmm.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <sstream>

#include "mlx/ops.h"
#include "qmm_driver.h"

namespace edger1 {
namespace {

ScaleType type_of(mx::Dtype dtype) {
  switch (dtype.val()) {
    case mx::Dtype::Val::float32:
      return ScaleType::f32;
    case mx::Dtype::Val::float16:
      return ScaleType::f16;
    case mx::Dtype::Val::bfloat16:
      return ScaleType::bf16;
    default:
      return ScaleType::e8m0;
  }
}

std::string text(const mx::Shape& shape) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < shape.size(); i++) {
    out << (i ? ", " : "") << shape[i];
  }
  out << ')';
  return out.str();
}

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  throw std::invalid_argument(out.str());
}

bool is_float(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
}

// Checks everything that does not depend on x; returns the number of columns K.
int check_matrix(const char* op, const mx::array& w, const mx::array& scales, const std::optional<mx::array>& biases,
                 const QuantMode& mode) {
  bool known = mode.fp4 ? mode.bits == 4 && mode.group == 32
                        : (mode.bits == 2 || mode.bits == 3 || mode.bits == 4 || mode.bits == 5 || mode.bits == 6 ||
                           mode.bits == 8) &&
                              (mode.group == 32 || mode.group == 64 || mode.group == 128);
  if (!known) {
    refuse(op, ": ", mode.fp4 ? "mxfp4" : "affine", " with bits ", mode.bits, " and group_size ", mode.group,
           "; expected ", mode.fp4 ? "bits 4 and group_size 32" : "bits 2, 3, 4, 5, 6 or 8 and group_size 32, 64 or 128");
  }
  if (w.dtype() != mx::uint32 || w.ndim() < 2) {
    refuse(op, ": w has dtype ", w.dtype(), " and shape ", text(w.shape()), "; expected packed uint32 of 2 or more axes");
  }
  int64_t code_bits = int64_t{w.shape(-1)} * 32;
  int64_t k = code_bits / mode.bits;
  if (code_bits % mode.bits != 0 || k % mode.group != 0 || k == 0 || k > (1 << 24)) {
    refuse(op, ": w's last axis of ", w.shape(-1), " words holds no whole number of groups of ", mode.group, " codes of ",
           mode.bits, " bits");
  }
  mx::Shape expected = w.shape();
  expected[expected.size() - 1] = static_cast<int>(k / mode.group);
  if (scales.shape() != expected) {
    refuse(op, ": scales have shape ", text(scales.shape()), "; w of shape ", text(w.shape()), " expects ",
           text(expected));
  }
  if (mode.fp4) {
    if (biases) {
      refuse(op, ": mxfp4 has no biases, but biases of shape ", text(biases->shape()), " were given");
    }
    if (scales.dtype() != mx::uint8) {
      refuse(op, ": mxfp4 scales have dtype ", scales.dtype(), "; expected uint8");
    }
    return static_cast<int>(k);
  }
  if (!biases) {
    refuse(op, ": affine quantization needs biases of shape ", text(expected));
  }
  if (biases->shape() != expected) {
    refuse(op, ": biases have shape ", text(biases->shape()), "; expected ", text(expected));
  }
  if (!is_float(scales.dtype()) || scales.dtype() != biases->dtype()) {
    refuse(op, ": scales and biases have dtypes ", scales.dtype(), " and ", biases->dtype(),
           "; expected float32, float16 or bfloat16 for both");
  }
  return static_cast<int>(k);
}

QuantMode make_mode(const char* op, bool transpose, int group_size, int bits, const std::string& mode,
                    const std::string& precision) {
  if (mode != "affine" && mode != "mxfp4") {
    refuse(op, ": mode is \"", mode, "\"; expected \"affine\" or \"mxfp4\"");
  }
  if (precision != "exact" && precision != "fast") {
    refuse(op, ": precision is \"", precision, "\"; expected \"exact\" or \"fast\"");
  }
  return {group_size, bits, mode == "mxfp4", transpose, transpose && precision == "fast"};
}

void check_x(const char* op, const mx::array& x, const mx::array& w, int k, const QuantMode& mode) {
  int expected = mode.transpose ? k : w.shape(-2);
  if (!is_float(x.dtype())) {
    refuse(op, ": x has dtype ", x.dtype(), "; expected float32, float16 or bfloat16");
  }
  if (x.ndim() < 1 || x.shape(-1) != expected) {
    refuse(op, ": x has shape ", text(x.shape()), "; its last axis should be ", expected, " for w of shape ",
           text(w.shape()), ", ", mode.bits, " bits, transpose ", mode.transpose ? "true" : "false");
  }
}

// The rows of `a` may lie anywhere, but the kernels read along a row: copy where the last axis has gaps. Runs at graph
// building and is free for arrays that are already so.
mx::array rows_contiguous(const mx::array& a, mx::StreamOrDevice s) {
  if (a.status() == mx::array::Status::unscheduled) {
    return mx::contiguous(a, false, s);
  }
  return a.strides(-1) == 1 || a.shape(-1) == 1 ? a : mx::contiguous(a, false, s);
}

QuantMatrix matrix_at(const std::vector<mx::array>& inputs, const QuantMode& mode, int64_t w_offset,
                      int64_t scale_offset, int64_t bias_offset) {
  const auto& w = inputs[1];
  const auto& scales = inputs[2];
  QuantMatrix m;
  m.codes = reinterpret_cast<const uint8_t*>(w.data<uint32_t>() + w_offset);
  m.row_bytes = w.strides(-2) * 4;
  m.type = type_of(scales.dtype());
  auto size = static_cast<int64_t>(scales.itemsize());
  m.scales = scales.data<char>() + scale_offset * size;
  m.scale_stride = scales.strides(-2) * size;
  if (!mode.fp4) {
    m.biases = inputs[3].data<char>() + bias_offset * size;
    m.bias_stride = inputs[3].strides(-2) * size;
  }
  m.n = w.shape(-2);
  m.k = static_cast<int>(int64_t{w.shape(-1)} * 32 / mode.bits);
  m.group = mode.group;
  m.bits = mode.bits;
  m.fp4 = mode.fp4;
  m.bias_ratio = mode.bias_ratio;
  return m;
}

std::vector<int64_t> offsets_of(const mx::array& a, int inner_dims) {
  std::vector<int64_t> found;
  for_each_outer(a, inner_dims, [&](int64_t offset) { found.push_back(offset); });
  return found;
}

std::shared_ptr<QmmJob> job_for(const mx::array& x, mx::array& out, const QuantMode& mode) {
  auto job = std::make_shared<QmmJob>();
  job->fast = mode.fast;
  job->transpose = mode.transpose;
  job->x.data = x.data<void>();
  job->x.type = type_of(x.dtype());
  job->x.element_stride = x.strides(-1);
  job->x.offsets = offsets_of(x, 1);
  job->out = out.data<void>();
  job->out_type = type_of(out.dtype());
  job->out_columns = out.shape(-1);
  return job;
}

class QuantizedMatmul : public CpuPrimitive {
 public:
  QuantizedMatmul(mx::Stream stream, QuantMode mode) : CpuPrimitive(stream), mode_(mode) {}

  const char* name() const override {
    return "EdgeR1QuantizedMatmul";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return mode_ == static_cast<const QuantizedMatmul&>(other).mode_;
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape[shape.size() - 1] = mode_.transpose ? inputs[1].shape(-2) : inputs[2].shape(-1) * mode_.group;
    return {shape};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& out = outputs[0];
    allocate(out);
    if (out.size() == 0) {
      return;
    }
    auto job = job_for(inputs[0], out, mode_);
    auto rows = static_cast<int64_t>(job->x.offsets.size());
    job->x_rows.resize(rows);
    std::iota(job->x_rows.begin(), job->x_rows.end(), 0);
    job->out_rows = job->x_rows;
    std::vector<int64_t> at_w = offsets_of(inputs[1], 2), at_scales = offsets_of(inputs[2], 2), at_biases(at_w.size());
    if (!mode_.fp4) {
      at_biases = offsets_of(inputs[3], 2);
    }
    auto matrices = static_cast<int64_t>(at_w.size());
    for (int64_t i = 0; i < matrices; i++) {
      job->groups.push_back({matrix_at(inputs, mode_, at_w[i], at_scales[i], at_biases[i]), rows / matrices * i,
                             rows / matrices * (i + 1)});
    }
    launch(stream(), [job] { run_qmm(*job); });
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    std::vector<mx::array> gradients;
    for (int arg : argnums) {
      if (arg != 0) {
        throw std::invalid_argument("quantized matmul has a gradient for x only, not for quantized weights");
      }
      QuantMode flipped = mode_;
      flipped.transpose = !mode_.transpose;
      flipped.fast = false;
      std::vector<mx::array> inputs = primals;
      inputs[0] = cotangents[0];
      gradients.push_back(mx::array(primals[0].shape(), primals[0].dtype(),
                                    std::make_shared<QuantizedMatmul>(stream(), flipped), std::move(inputs)));
    }
    return gradients;
  }

  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override {
    if (argnums.size() != 1 || argnums[0] != 0) {
      throw std::invalid_argument("quantized matmul has a derivative for x only, not for quantized weights");
    }
    std::vector<mx::array> inputs = primals;
    inputs[0] = tangents[0];
    return {mx::array(output_shapes(primals)[0], primals[0].dtype(), std::make_shared<QuantizedMatmul>(stream(), mode_),
                      std::move(inputs))};
  }

 private:
  QuantMode mode_;
};

// Rows that were widened by a broadcast lie at the same place: point them at one, so that it is prepared once.
void merge_repeated_rows(QmmJob& job) {
  std::vector<int64_t> kept;
  job.x_rows.clear();
  for (int64_t offset : job.x.offsets) {
    if (kept.empty() || kept.back() != offset) {
      kept.push_back(offset);
    }
    job.x_rows.push_back(static_cast<int64_t>(kept.size()) - 1);
  }
  job.x.offsets = std::move(kept);
}

class GatherQuantizedMatmul : public CpuPrimitive {
 public:
  GatherQuantizedMatmul(mx::Stream stream, QuantMode mode) : CpuPrimitive(stream), mode_(mode) {}

  const char* name() const override {
    return "EdgeR1GatherQuantizedMatmul";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return mode_ == static_cast<const GatherQuantizedMatmul&>(other).mode_;
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape[shape.size() - 1] = mode_.transpose ? inputs[1].shape(-2) : inputs[2].shape(-1) * mode_.group;
    return {shape};
  }

  // Inputs: x[i..., M, columns], w[e..., N, packed], scales, biases unless mxfp4, indices[i...] into the e axes.
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& out = outputs[0];
    allocate(out);
    if (out.size() == 0) {
      return;
    }
    struct Work {
      std::shared_ptr<QmmJob> job;
      std::vector<QuantMatrix> matrices;
      const uint32_t* indices;
      std::vector<int64_t> index_offsets;
      int64_t rows_each;
    };
    auto work = std::make_shared<Work>();
    work->job = job_for(inputs[0], out, mode_);
    merge_repeated_rows(*work->job);
    std::vector<int64_t> at_w = offsets_of(inputs[1], 2), at_scales = offsets_of(inputs[2], 2), at_biases(at_w.size());
    if (!mode_.fp4) {
      at_biases = offsets_of(inputs[3], 2);
    }
    for (size_t i = 0; i < at_w.size(); i++) {
      work->matrices.push_back(matrix_at(inputs, mode_, at_w[i], at_scales[i], at_biases[i]));
    }
    work->indices = inputs.back().data<uint32_t>();
    work->index_offsets = offsets_of(inputs.back(), 0);
    work->rows_each = inputs[0].shape(-2);
    launch(stream(), [work] {
      group_by_matrix(*work->job, work->matrices, work->indices, work->index_offsets, work->rows_each);
      run_qmm(*work->job);
    });
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    if (argnums.size() != 1 || argnums[0] != 0) {
      throw std::invalid_argument("gathered quantized matmul has a gradient for x only, not for quantized weights");
    }
    QuantMode flipped = mode_;
    flipped.transpose = !mode_.transpose;
    flipped.fast = false;
    std::vector<mx::array> inputs = primals;
    inputs[0] = cotangents[0];
    return {mx::array(primals[0].shape(), primals[0].dtype(), std::make_shared<GatherQuantizedMatmul>(stream(), flipped),
                      std::move(inputs))};
  }

 private:
  // Orders the rows by the matrix they meet. Throws where an index names none; nothing has been computed by then.
  static void group_by_matrix(QmmJob& job, const std::vector<QuantMatrix>& matrices, const uint32_t* indices,
                              const std::vector<int64_t>& offsets, int64_t rows_each) {
    std::vector<int64_t> end(matrices.size() + 1, 0);
    for (int64_t offset : offsets) {
      if (indices[offset] >= matrices.size()) {
        refuse("gather_qmm: index ", indices[offset], " where w has ", matrices.size(), " matrices");
      }
      end[indices[offset] + 1] += rows_each;
    }
    std::partial_sum(end.begin(), end.end(), end.begin());
    for (size_t e = 0; e < matrices.size(); e++) {
      if (end[e + 1] > end[e]) {
        job.groups.push_back({matrices[e], end[e], end[e + 1]});
      }
    }
    std::vector<int64_t> source(job.x_rows.size());
    job.out_rows.resize(source.size());
    for (size_t i = 0; i < offsets.size(); i++) {
      int64_t& next = end[indices[offsets[i]]];
      for (int64_t r = 0; r < rows_each; r++, next++) {
        source[next] = job.x_rows[i * rows_each + r];
        job.out_rows[next] = static_cast<int64_t>(i) * rows_each + r;
      }
    }
    job.x_rows = std::move(source);
  }

  QuantMode mode_;
};

mx::Shape broadcast_batch(const mx::Shape& a, const mx::Shape& b, const char* what) {
  size_t axes = std::max(a.size(), b.size());
  mx::Shape result;
  for (size_t i = 0; i < axes; i++) {
    int x = i + a.size() >= axes ? a[i + a.size() - axes] : 1;
    int y = i + b.size() >= axes ? b[i + b.size() - axes] : 1;
    if (x != y && x != 1 && y != 1) {
      refuse(what, " of shapes ", text(a), " and ", text(b), " do not broadcast");
    }
    result.push_back(x == 1 ? y : x);
  }
  return result;
}

mx::array widen(const mx::array& a, mx::Shape batch, mx::StreamOrDevice s) {
  batch.push_back(a.shape(-2));
  batch.push_back(a.shape(-1));
  return a.shape() == batch ? a : mx::broadcast_to(a, batch, s);
}

mx::Shape batch_of(const mx::array& a) {
  return mx::Shape(a.shape().begin(), a.shape().end() - 2);
}

} // namespace

mx::array qmm(const mx::array& x_in, const mx::array& w_in, const mx::array& scales_in,
              const std::optional<mx::array>& biases_in, bool transpose, int group_size, int bits,
              const std::string& mode_name, const std::string& precision, float bias_ratio, mx::StreamOrDevice s) {
  const char* op = "qmm";
  mx::Stream stream = cpu_stream(s, op);
  QuantMode mode = make_mode(op, transpose, group_size, bits, mode_name, precision);
  mode.bias_ratio = mode.fp4 ? 0 : bias_ratio;
  int k = check_matrix(op, w_in, scales_in, biases_in, mode);
  check_x(op, x_in, w_in, k, mode);
  mx::array x = x_in, w = rows_contiguous(w_in, stream), scales = rows_contiguous(scales_in, stream);
  std::vector<mx::array> inputs{x, w, scales};
  if (biases_in) {
    inputs.push_back(rows_contiguous(*biases_in, stream));
  }
  if (w.ndim() > 2) {
    if (x.ndim() == 1) {
      inputs[0] = mx::expand_dims(x, 0, stream);
    }
    mx::Shape batch = broadcast_batch(batch_of(inputs[0]), batch_of(w), "qmm: the batch axes of x and w");
    for (auto& input : inputs) {
      input = widen(input, batch, stream);
    }
  }
  mx::Shape shape = inputs[0].shape();
  shape[shape.size() - 1] = transpose ? w.shape(-2) : k;
  mx::Dtype dtype = x.dtype();
  mx::array out(shape, dtype, std::make_shared<QuantizedMatmul>(stream, mode), std::move(inputs));
  return x_in.ndim() == 1 && w.ndim() > 2 ? mx::squeeze(out, -2, stream) : out;
}

float bias_ratio(const mx::array& w, const mx::array& scales, const mx::array& biases, int group_size, int bits) {
  QuantMode mode = make_mode("bias_ratio", true, group_size, bits, "affine", "exact");
  check_matrix("bias_ratio", w, scales, biases, mode);
  for (const auto* a : {&w, &scales, &biases}) {
    if (a->status() == mx::array::Status::unscheduled || a->ndim() != 2 || a->strides(-1) != 1) {
      return 0;
    }
    mx::array(*a).wait();
  }
  QuantMatrix m = matrix_at({w, w, scales, biases}, mode, 0, 0, 0);
  find_bias_ratio(m);
  return m.bias_ratio;
}

mx::array gather_qmm(const mx::array& x_in, const mx::array& w_in, const mx::array& scales_in,
                     const std::optional<mx::array>& biases_in, const std::optional<mx::array>& lhs_indices,
                     const std::optional<mx::array>& rhs_indices, bool transpose, int group_size, int bits,
                     const std::string& mode_name, const std::string& precision, mx::StreamOrDevice s) {
  const char* op = "gather_qmm";
  mx::Stream stream = cpu_stream(s, op);
  QuantMode mode = make_mode(op, transpose, group_size, bits, mode_name, precision);
  int k = check_matrix(op, w_in, scales_in, biases_in, mode);
  check_x(op, x_in, w_in, k, mode);
  if (x_in.ndim() < 2) {
    refuse(op, ": x has shape ", text(x_in.shape()), "; expected at least two axes");
  }
  auto as_index = [&](const mx::array& a, const char* name) {
    if (!mx::issubdtype(a.dtype(), mx::integer)) {
      refuse(op, ": ", name, " have dtype ", a.dtype(), "; expected integers");
    }
    return a.dtype() == mx::uint32 ? a : mx::astype(a, mx::uint32, stream);
  };
  mx::array x = x_in;
  if (lhs_indices) {
    x = mx::take(mx::flatten(x, 0, -3, stream), as_index(*lhs_indices, "lhs_indices"), 0, stream);
  }
  mx::Shape experts = batch_of(w_in);
  int64_t matrices = std::accumulate(experts.begin(), experts.end(), int64_t{1}, std::multiplies<>());
  mx::array indices = rhs_indices
      ? as_index(*rhs_indices, "rhs_indices")
      : mx::reshape(mx::arange(0, static_cast<int>(matrices), mx::uint32, stream), experts, stream);
  mx::Shape batch = broadcast_batch(batch_of(x), indices.shape(), "gather_qmm: the batch axes of x and the indices");
  std::vector<mx::array> inputs{widen(x, batch, stream), rows_contiguous(w_in, stream),
                                rows_contiguous(scales_in, stream)};
  if (biases_in) {
    inputs.push_back(rows_contiguous(*biases_in, stream));
  }
  inputs.push_back(indices.shape() == batch ? indices : mx::broadcast_to(indices, batch, stream));
  mx::Shape shape = inputs[0].shape();
  shape[shape.size() - 1] = transpose ? w_in.shape(-2) : k;
  return mx::array(shape, x.dtype(), std::make_shared<GatherQuantizedMatmul>(stream, mode), std::move(inputs));
}

} // namespace edger1
