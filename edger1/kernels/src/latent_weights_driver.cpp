// Products of latent attention's few rows with its weights, and these as floats.
#include <algorithm>

#include "dequantize_ops.h"
#include "latent_plan.h"
#include "pool.h"
#include "qmm_driver.h"

namespace edger1 {
namespace {

// mxfp4 has no scales of a float type.
Float float_type(ScaleType type) {
  return type == ScaleType::f16 ? Float::f16 : type == ScaleType::bf16 ? Float::bf16 : Float::f32;
}

const void* group_at(const void* groups, int64_t row_offset, ScaleType type, int group) {
  int64_t bytes = type == ScaleType::f32 ? 4 : type == ScaleType::e8m0 ? 1 : 2;
  return static_cast<const char*>(groups) + row_offset + group * bytes;
}

// A row's values from column `first` on, which begins a group.
QuantizedRow quantized_row(const QuantMatrix& w, int row, int first) {
  int group = first / w.group;
  return {w.codes + row * w.row_bytes + int64_t{first} * w.bits / 8,
          group_at(w.scales, row * w.scale_stride, w.type, group),
          w.fp4 ? nullptr : group_at(w.biases, row * w.bias_stride, w.type, group),
          float_type(w.type),
          w.group,
          w.bits,
          w.fp4};
}

// Calls body(i, count, stride) for runs of rows that lie at one stride.
template <class Body>
void for_each_stride(int m, float* const* out, Body&& body) {
  for (int i = 0; i < m;) {
    int count = 1;
    int64_t stride = i + 1 < m ? out[i + 1] - out[i] : 0;
    while (i + count < m && out[i + count] - out[i + count - 1] == stride) {
      count++;
    }
    body(i, count, stride);
    i += count;
  }
}

} // namespace

void widen_row(const Projection& p, int row, int first, int count, float* out) {
  if (p.quantized) {
    dequantize_ops().row(out, quantized_row(p.w, row, first), count);
  } else {
    ops().to_f32(out, offset(p.plain, p.plain_type, row * p.plain_stride + first), p.plain_type, count);
  }
}

void widen(const Projection& p, float* out) {
  for (int n = 0; n < p.n; n++) {
    widen_row(p, n, 0, p.k, out + int64_t{n} * p.k);
  }
}

void project_rows(const Projection& p, bool fast, const float* x, int m, float* const* out) {
  if (p.quantized) {
    int64_t bytes = prepared_layout(p.k, fast).bytes;
    auto* prepared = static_cast<char*>(thread_scratch(0, static_cast<size_t>(m * bytes)));
    const void* rows[kMaxRows];
    for (int i = 0; i < m; i++) {
      rows[i] = prepared + i * bytes;
      (fast ? qmm_kernels().prepare_fast : qmm_kernels().prepare_exact)(p.w, x + int64_t{i} * p.k, prepared + i * bytes);
    }
    (fast ? qmm_kernels().rows_fast : qmm_kernels().rows_exact)(p.w, rows, m, 0, p.n, out);
  } else {
    for_each_stride(m, out, [&](int i, int count, int64_t stride) {
      ops().dot_rows(out[i], stride, x + int64_t{i} * p.k, p.k, count, p.plain, p.plain_type, p.plain_stride, p.k, 0, p.n);
    });
  }
}

void project_back(const Projection& p, const float* x, int m, float* const* out) {
  const QuantMatrix& w = p.w;
  if (p.quantized && !w.fp4 && (w.bits == 2 || w.bits == 4 || w.bits == 8)) {
    return dequantize_ops().back(out, x, m, p.n, quantized_row(w, 0, 0), w.row_bytes, w.scale_stride, p.k);
  }
  // Else columns are read back as floats: whole groups, and few enough for the first-level cache.
  int width = p.quantized ? std::max(w.group, 64) : p.k;
  auto* scratch = static_cast<float*>(thread_scratch(0, static_cast<size_t>(p.quantized ? int64_t{p.n} * width : 0) * 4));
  for (int first = 0; first < p.k; first += width) {
    int columns = std::min(width, p.k - first);
    for (int n = 0; n < p.n && p.quantized; n++) {
      widen_row(p, n, first, columns, scratch + int64_t{n} * columns);
    }
    const void* rows = p.quantized ? scratch : p.plain;
    for_each_stride(m, out, [&](int i, int count, int64_t stride) {
      ops().axpy_rows(out[i] + first, stride, x + int64_t{i} * p.n, p.n, count, rows,
                      p.quantized ? Float::f32 : p.plain_type, p.quantized ? columns : p.plain_stride, p.n, 0, columns);
    });
  }
}

} // namespace edger1
