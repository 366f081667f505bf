// The projections around latent attention, for few rows.
#include <algorithm>
#include <cstring>

#include "few_rows.h"
#include "latent_plan.h"
#include "pool.h"
#include "qmm_driver.h"
#include "rope.h"

namespace edger1 {
namespace {

// Rows prepared for a product, in memory of the caller's.
struct Prepared {
  const Projection* form = nullptr;
  const char* rows = nullptr;
  int64_t stride = 0;
};

int64_t prepared_bytes(const Projection& p, bool fast) {
  return p.quantized ? prepared_layout(p.k, fast).bytes : padded(int64_t{p.k} * 4, 64);
}

class Layer {
 public:
  Layer(const LatentPlan& plan, const LatentLayerCall& call)
      : plan_(plan), call_(call), rows_(call.batch * call.length) {
    int64_t deepest = 0;
    for (const Projection* p : {&plan.q_a, &plan.q, &plan.kv_a, &plan.o}) {
      deepest = std::max(deepest, p->n > 0 ? prepared_bytes(*p, plan.fast) : 0);
    }
    prepared_bytes_ = rows_ * padded(deepest, 64);
    int64_t floats[] = {int64_t{rows_} * plan.q_a.n, int64_t{rows_} * plan.q.n, int64_t{rows_} * plan.kv_a.n,
                        int64_t{rows_} * plan.heads * plan.value};
    int64_t total = 2 * prepared_bytes_;
    for (int64_t& n : floats) {
      n = padded(n, 16);
      total += n * 4;
    }
    // Attention itself takes the thread's scratch.
    memory_.resize(static_cast<size_t>(total / 4 + 16));
    auto address = reinterpret_cast<uintptr_t>(memory_.data());
    char* at = reinterpret_cast<char*>(memory_.data()) + (padded(static_cast<int64_t>(address), 64) - static_cast<int64_t>(address));
    prepared_ = at;
    float* next = reinterpret_cast<float*>(at + 2 * prepared_bytes_);
    float** areas[] = {&q_a_, &q_, &kv_, &attended_};
    for (int i = 0; i < 4; i++) {
      *areas[i] = next;
      next += floats[i];
    }
  }

  void operator()() {
    const Projection& first = plan_.q_a.n > 0 ? plan_.q_a : plan_.q;
    float* first_out = plan_.q_a.n > 0 ? q_a_ : q_;
    Prepared x = prepare(first, 0, call_.x, call_.x_stride);
    Prepared x_kv = same_rows(first, plan_.kv_a) ? x : prepare(plan_.kv_a, 1, call_.x, call_.x_stride);
    sweep(first.n + plan_.kv_a.n, first.row_bytes(), [&](int n0, int n1) {
      part(first, x, n0, n1, 0, first_out);
      part(plan_.kv_a, x_kv, n0, n1, first.n, kv_);
    });
    if (plan_.q_a.n > 0) {
      for (int i = 0; i < rows_; i++) {
        float* row = q_a_ + int64_t{i} * plan_.q_a.n;
        ops().rms_norm(row, row, plan_.q_norm.weight, plan_.q_a.n, plan_.q_norm.eps);
      }
      Prepared normed = prepare(plan_.q, 0, q_a_, plan_.q_a.n);
      sweep(plan_.q.n, plan_.q.row_bytes(), [&](int n0, int n1) { part(plan_.q, normed, n0, n1, 0, q_); });
    }
    rotate();
    attend();
    Prepared attended = prepare(plan_.o, 0, attended_, int64_t{plan_.heads} * plan_.value);
    sweep(plan_.o.n, plan_.o.row_bytes(), [&](int n0, int n1) { part(plan_.o, attended, n0, n1, 0, call_.out); });
  }

 private:
  template <class Body>
  static void sweep(int n, int64_t row_bytes, Body&& body) {
    sweep_rows(n, row_bytes, n, [&](int64_t n0, int64_t n1) { body(static_cast<int>(n0), static_cast<int>(n1)); });
  }

  Prepared prepare(const Projection& form, int slot, const float* x, int64_t x_stride) {
    char* to = prepared_ + slot * prepared_bytes_;
    int64_t stride = prepared_bytes(form, plan_.fast);
    auto one = [&](int64_t i) {
      const float* row = x + i * x_stride;
      if (form.quantized) {
        (plan_.fast ? qmm_kernels().prepare_fast : qmm_kernels().prepare_exact)(form.w, row, to + i * stride);
      } else {
        std::memcpy(to + i * stride, row, size_t(form.k) * 4);
      }
    };
    if (rows_ == 1 || int64_t{rows_} * form.k < (1 << 13)) {
      for (int i = 0; i < rows_; i++) {
        one(i);
      }
    } else {
      parallel_for(rows_, one);
    }
    return {&form, to, stride};
  }

  // What of the columns [n0, n1) of several results side by side falls to the one that begins at `first`.
  void part(const Projection& p, const Prepared& x, int n0, int n1, int first, float* out) const {
    n0 = std::max(n0 - first, 0);
    n1 = std::min(n1 - first, p.n);
    if (n0 >= n1) {
      return;
    }
    if (p.quantized) {
      const void* in[kMaxRows];
      float* to[kMaxRows];
      for (int i = 0; i < rows_; i++) {
        in[i] = x.rows + i * x.stride;
        to[i] = out + int64_t{i} * p.n + n0;
      }
      (plan_.fast ? qmm_kernels().rows_fast : qmm_kernels().rows_exact)(p.w, in, rows_, n0, n1, to);
    } else {
      ops().dot_rows(out, p.n, reinterpret_cast<const float*>(x.rows), x.stride / 4, rows_, p.plain, p.plain_type,
                     p.plain_stride, p.k, n0, n1);
    }
    for (int i = 0; i < rows_ && p.bias; i++) {
      ops().blend_row(out + int64_t{i} * p.n + n0, 1, p.bias + n0, 1, n1 - n0);
    }
  }

  void turn(float* row, const float* cosines, const float* sines) const {
    if (plan_.rope_multiplier != 1) {
      ops().scale_row(row, plan_.rope_multiplier, plan_.rope_dims);
    }
    ops().rope(row, row, cosines, sines, plan_.rope_dims / 2, plan_.rope_interleaved, false);
  }

  // Rotates queries and keys, and puts normed latents and keys into the cache.
  void rotate() {
    int head_dim = plan_.nope + plan_.rope;
    auto angles = angles_for(call_.offset, call_.length, plan_.rope_scale, plan_.inverse_freqs);
    for (int i = 0; i < rows_; i++) {
      int l = i % call_.length;
      float* kv = kv_ + int64_t{i} * plan_.kv_a.n;
      int64_t place = int64_t{i / call_.length} * call_.capacity + call_.offset + l;
      ops().rms_norm(call_.latent + place * plan_.rank, kv, plan_.kv_norm.weight, plan_.rank, plan_.kv_norm.eps);
      for (int h = 0; h < plan_.heads && plan_.rope_dims > 0; h++) {
        turn(q_ + int64_t{i} * plan_.q.n + h * head_dim + plan_.nope, angles->cosines(l), angles->sines(l));
      }
      if (plan_.rope_dims > 0) {
        turn(kv + plan_.rank, angles->cosines(l), angles->sines(l));
      }
      std::copy_n(kv + plan_.rank, plan_.rope, call_.k_pe + place * plan_.rope);
    }
  }

  void attend() {
    LatentCall call;
    call.batch = call_.batch;
    call.length = call_.length;
    call.keys = call_.offset + call_.length;
    int64_t head = plan_.nope + plan_.rope, row = plan_.q.n;
    call.q_nope = {q_, Float::f32, row * call_.length, head, row, 1};
    call.q_pe = {q_ + plan_.nope, Float::f32, row * call_.length, head, row, 1};
    call.latent = {call_.latent, Float::f32, int64_t{call_.capacity} * plan_.rank, 0, plan_.rank, 1};
    call.k_pe = {call_.k_pe, Float::f32, int64_t{call_.capacity} * plan_.rope, 0, plan_.rope, 1};
    call.causal = call_.causal;
    call.keep = call_.keep;
    std::copy_n(call_.mask_strides, 3, call.mask_strides);
    call.out = attended_;
    run_latent(plan_, call);
  }

  const LatentPlan& plan_;
  const LatentLayerCall& call_;
  int rows_;
  int64_t prepared_bytes_ = 0;
  std::vector<float> memory_;
  char* prepared_;
  float *q_a_, *q_, *kv_, *attended_;
};

} // namespace

void run_latent_layer(const LatentPlan& plan, const LatentLayerCall& call) {
  Layer layer(plan, call);
  layer();
}

} // namespace edger1
