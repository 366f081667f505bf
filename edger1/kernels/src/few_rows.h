// Products of a few rows with the rows of a matrix, quantized or plain, in the same bits for each row however many there are.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "decoder_plan.h"
#include "ops_table.h"
#include "pool.h"
#include "qmm_driver.h"

namespace edger1 {

inline bool same_rows(const Projection& a, const Projection& b) {
  return a.quantized == b.quantized && a.k == b.k &&
      (!a.quantized || (a.w.bits == b.w.bits && a.w.group == b.w.group && a.w.fp4 == b.w.fp4));
}

// The index of p's form among `forms`, added if it is new.
inline int form_index(std::vector<Projection>& forms, const Projection& p) {
  auto found = std::find_if(forms.begin(), forms.end(), [&](const Projection& f) { return same_rows(f, p); });
  if (found != forms.end()) {
    return static_cast<int>(found - forms.begin());
  }
  forms.push_back(p);
  return static_cast<int>(forms.size()) - 1;
}

// Rows of one input, prepared in each of the forms that projections of it read.
class PreparedRows {
 public:
  PreparedRows(const std::vector<Projection>& forms, int64_t rows, bool fast) : forms_(forms), rows_(rows), fast_(fast) {
    for (const Projection& form : forms) {
      begin_.push_back(bytes_);
      bytes_ += padded(rows * form.prepared_bytes(fast_), 64);
    }
  }

  int64_t bytes() const {
    return bytes_;
  }
  void place(char* at) {
    at_ = at;
  }
  void prepare(int64_t row, const float* x) const {
    for (size_t f = 0; f < forms_.size(); f++) {
      const Projection& form = forms_[f];
      char* to = at_ + begin_[f] + row * form.prepared_bytes(fast_);
      if (form.quantized) {
        (fast_ ? qmm_kernels().prepare_fast : qmm_kernels().prepare_exact)(form.w, x, to);
      } else {
        std::memcpy(to, x, static_cast<size_t>(form.k) * 4);
      }
    }
  }
  // Prepares all rows, at x + row * stride, on one thread where that is less work than waking others.
  void prepare_all(const float* x, int64_t stride) const {
    if (forms_.empty()) {
      return;
    }
    if (rows_ * forms_[0].k < kSerial) {
      for (int64_t i = 0; i < rows_; i++) {
        prepare(i, x + i * stride);
      }
    } else {
      parallel_for(rows_, [&](int64_t i) { prepare(i, x + i * stride); });
    }
  }
  // The same for some rows.
  void prepare_some(const std::vector<int64_t>& rows, const float* x, int64_t stride) const {
    auto count = static_cast<int64_t>(rows.size());
    auto one = [&](int64_t i) { prepare(rows[static_cast<size_t>(i)], x + rows[static_cast<size_t>(i)] * stride); };
    if (!forms_.empty() && count * forms_[0].k >= kSerial) {
      return parallel_for(count, one);
    }
    for (int64_t i = 0; i < count; i++) {
      one(i);
    }
  }
  const char* row(int form, int64_t row) const {
    return at_ + begin_[form] + row * forms_[form].prepared_bytes(fast_);
  }

 private:
  static constexpr int64_t kSerial = 1 << 13; // elements that are not worth waking threads for

  const std::vector<Projection>& forms_;
  int64_t rows_;
  bool fast_;
  int64_t bytes_ = 0;
  std::vector<int64_t> begin_;
  char* at_ = nullptr;
};

// out[i][n - n0] for m <= kMaxRows prepared rows and rows n0 <= n < n1 of the matrix, with its bias.
inline void multiply_rows(const Projection& p, bool fast, const void* const* x, int m, int n0, int n1,
                          float* const* out) {
  if (p.quantized) {
    (fast ? qmm_kernels().rows_fast : qmm_kernels().rows_exact)(p.w, x, m, n0, n1, out);
  } else {
    // Rows of x lie anywhere: a few rows of the matrix meet all of them before the next few.
    constexpr int block = 16;
    for (int n = n0; n < n1; n += block) {
      for (int i = 0; i < m; i++) {
        ops().dot_rows(out[i] - n0, 0, static_cast<const float*>(x[i]), 0, 1, p.plain, p.plain_type, p.plain_stride, p.k,
                       n, std::min(n + block, n1));
      }
    }
  }
  for (int i = 0; i < m && p.bias; i++) {
    ops().blend_row(out[i], 1, p.bias + n0, 1, n1 - n0);
  }
}

// Calls body(begin, end) for ranges that cover [0, n): long ones first, since each begins with a wait for memory, and then
// ever shorter ones, so that all threads end together. Where rows are many, the ranges are multiples of those that a kernel
// takes side by side.
template <class Body>
void sweep_rows(int64_t n, int64_t row_bytes, int64_t longest, Body&& body) {
  constexpr int64_t least_bytes = 8 << 10, side_by_side = 4;
  std::vector<int64_t> bounds{0};
  int64_t least = std::max<int64_t>(least_bytes / std::max<int64_t>(row_bytes, 1), 1), threads = pool_threads();
  while (bounds.back() < n) {
    int64_t left = n - bounds.back();
    int64_t size = std::min(std::clamp(left * 2 / (3 * threads), std::min(least, left), left), longest);
    bounds.push_back(bounds.back() + (size < 4 * side_by_side ? size : size / side_by_side * side_by_side));
  }
  parallel_for(static_cast<int64_t>(bounds.size()) - 1,
               [&](int64_t i) { body(bounds[static_cast<size_t>(i)], bounds[static_cast<size_t>(i) + 1]); });
}

} // namespace edger1
