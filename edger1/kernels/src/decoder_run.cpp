#include <algorithm>
#include <cstring>
#include <memory>

#include "decoder_plan.h"
#include "pool.h"
#include "qmm_driver.h"
#include "rope.h"

namespace edger1 {
namespace {

constexpr int64_t kRangeBytes = 8 << 10;     // weights below which splitting further costs more than it gains
constexpr int kMostRanges = 512;
constexpr int64_t kSerialPrepare = 1 << 13;  // elements below which preparing rows is not worth a job

int64_t scale_bytes(ScaleType type) {
  return type == ScaleType::f32 ? 4 : type == ScaleType::e8m0 ? 1 : 2;
}

bool same_form(const Projection& a, const Projection& b) {
  return a.quantized == b.quantized && a.k == b.k &&
      (!a.quantized || (a.w.bits == b.w.bits && a.w.group == b.w.group && a.w.fp4 == b.w.fp4));
}

int64_t form_bytes(const Projection& form, bool fast) {
  return form.quantized ? prepared_layout(form.k, fast).bytes : int64_t{form.k} * 4;
}

// Columns [n0, n1) of the results of rows in one prepared form.
void product(const Projection& p, bool fast, const char* prepared, int64_t stride, int m, int n0, int n1,
             float* const* out) {
  if (p.quantized) {
    const void* x[kMaxRows];
    for (int i = 0; i < m; i++) {
      x[i] = prepared + i * stride;
    }
    (fast ? qmm_kernels().rows_fast : qmm_kernels().rows_exact)(p.w, x, m, n0, n1, out);
  } else {
    int64_t out_stride = m > 1 ? out[1] - out[0] : 0;
    ops().dot_rows(out[0] - n0, out_stride, reinterpret_cast<const float*>(prepared), stride / 4, m, p.plain,
                   p.plain_type, p.plain_stride, p.k, n0, n1);
  }
  for (int i = 0; i < m && p.bias; i++) {
    ops().blend_row(out[i], 1, p.bias + n0, 1, n1 - n0);
  }
}

class Run {
 public:
  Run(const DecoderPlan& plan, const DecoderCall& call)
      : plan_(plan), call_(call), rows_(call.batch * call.length) {
    attention_.batch = call.batch;
    attention_.length = call.length;
    attention_.heads = plan.heads;
    attention_.kv_heads = plan.kv_heads;
    attention_.dim = plan.head_dim;
    attention_.keys = call.keys;
    attention_.values = call.values;
    attention_.type = call.cache_type;
    attention_.order = call.order;
    attention_.first_slots = call.first_slots;
    attention_.end = call.offset + call.length;
    attention_.mask = call.mask;
    attention_.sinks = plan.sinks;
    attention_.soft_cap = plan.soft_cap;
    int64_t q = int64_t{rows_} * plan.heads * plan.head_dim, kv = int64_t{rows_} * plan.kv_heads * plan.head_dim;
    int64_t prepared = 0;
    for (const auto& forms : plan.forms) {
      int64_t bytes = 0;
      for (const auto& form : forms) {
        bytes += padded(rows_ * form_bytes(form, plan.fast), 64);
      }
      prepared = std::max(prepared, bytes);
    }
    int64_t hidden = int64_t{rows_} * plan.hidden;
    int64_t floats[] = {hidden, hidden, q, kv, kv, q, q, attention_.scratch_floats(), int64_t{rows_} * plan.inner};
    int64_t total = prepared;
    for (int64_t& n : floats) {
      n = padded(n, 16) + 16;
      total += n * 4;
    }
    prepared_ = static_cast<char*>(thread_scratch(1, static_cast<size_t>(total)));
    float** areas[] = {&normed_, &results_, &q_, &k_, &v_, &queries_, &attended_, &parts_, &gated_};
    auto* at = reinterpret_cast<float*>(prepared_ + prepared);
    for (int i = 0; i < 9; i++) {
      *areas[i] = at;
      at += floats[i];
    }
  }

  void operator()() {
    int q = plan_.q.n, kv = plan_.k.n;
    RowSpan in = normalize(plan_.attention_norm, {call_.x, call_.x_stride}, normed_);
    prepare(0, in);
    sweep(plan_.q.n + plan_.k.n + plan_.v.n, plan_.q.row_bytes(), [&](int n0, int n1) {
      part(plan_.q, 0, n0, n1, 0, q_);
      part(plan_.k, 0, n0, n1, q, k_);
      part(plan_.v, 0, n0, n1, q + kv, v_);
    });
    rotate();
    attention_.queries = queries_;
    attention_.out = attended_;
    attend(attention_, parts_);
    prepare(1, {attended_, q});
    if (plan_.parallel && call_.normed) {
      copy_rows(call_.normed, in);
    }
    if (!plan_.residual) {
      std::fill_n(call_.out, int64_t{rows_} * plan_.hidden, 0.0f);
    } else if (call_.out != call_.x) {
      copy_rows(call_.out, {call_.x, call_.x_stride});
    }
    add_product(plan_.o, 1, plan_.attention_post_norm);
    if (!plan_.parallel && (plan_.has_mlp || call_.normed)) {
      in = normalize(plan_.mlp_norm, {call_.out, plan_.hidden}, call_.normed ? call_.normed : normed_);
      if (call_.normed && in.rows != call_.normed) {
        copy_rows(call_.normed, in);
      }
    }
    if (!plan_.has_mlp) {
      return;
    }
    prepare(2, in);
    sweep(plan_.inner, plan_.gate.row_bytes() + plan_.up.row_bytes(), [&](int n0, int n1) { gate(n0, n1); });
    prepare(3, {gated_, plan_.inner});
    add_product(plan_.down, 3, plan_.mlp_post_norm);
  }

 private:
  // Calls body(n0, n1) for ranges that cover [0, n): long ones first, since each begins with a wait for memory, and then
  // ever shorter ones, so that all threads end together.
  template <class Body>
  void sweep(int n, int64_t row_bytes, Body&& body) {
    int bounds[kMostRanges + 1];
    int ranges = 0, least = static_cast<int>(std::max<int64_t>(kRangeBytes / row_bytes, 1)), threads = pool_threads();
    bounds[0] = 0;
    while (bounds[ranges] < n) {
      int left = n - bounds[ranges];
      int size = ranges + 1 == kMostRanges ? left : std::clamp(left * 2 / (3 * threads), std::min(least, left), left);
      bounds[ranges + 1] = bounds[ranges] + size;
      ranges++;
    }
    parallel_for(ranges, [&](int64_t i) { body(bounds[i], bounds[i + 1]); });
  }

  struct RowSpan {
    const float* rows;
    int64_t stride;
  };

  void copy_rows(float* to, RowSpan from) const {
    for (int i = 0; i < rows_; i++) {
      std::memcpy(to + int64_t{i} * plan_.hidden, from.rows + i * from.stride, size_t(plan_.hidden) * 4);
    }
  }

  template <class Body>
  void each_row(int64_t elements, Body&& body) {
    if (rows_ == 1 || rows_ * elements < kSerialPrepare) {
      for (int i = 0; i < rows_; i++) {
        body(i);
      }
    } else {
      parallel_for(rows_, [&](int64_t i) { body(static_cast<int>(i)); });
    }
  }

  // The rows normed, in `to`; where there is no norm the rows as they are.
  RowSpan normalize(const NormPlan& norm, RowSpan x, float* to) {
    if (!norm.weight) {
      return x;
    }
    each_row(plan_.hidden, [&](int i) { norm_row(norm, to + int64_t{i} * plan_.hidden, x.rows + i * x.stride, plan_.hidden); });
    return {to, plan_.hidden};
  }

  static void norm_row(const NormPlan& norm, float* to, const float* from, int n) {
    if (norm.centered) {
      ops().layer_norm(to, from, norm.weight, norm.bias, n, norm.eps);
    } else {
      ops().rms_norm(to, from, norm.weight, n, norm.eps);
    }
  }

  // All forms of a stage's input, one after the other.
  void prepare(int stage, RowSpan x) {
    char* to = prepared_;
    for (const Projection& form : plan_.forms[stage]) {
      int64_t bytes = form_bytes(form, plan_.fast);
      each_row(form.k, [&](int i) {
        const float* from = x.rows + i * x.stride;
        if (form.quantized) {
          (plan_.fast ? qmm_kernels().prepare_fast : qmm_kernels().prepare_exact)(form.w, from, to + i * bytes);
        } else {
          std::memcpy(to + i * bytes, from, static_cast<size_t>(form.k) * 4);
        }
      });
      to += padded(rows_ * bytes, 64);
    }
  }

  void multiply(const Projection& p, int stage, int n0, int n1, float* const* out) const {
    const char* at = prepared_;
    for (int i = 0; i < p.form; i++) {
      at += padded(rows_ * form_bytes(plan_.forms[stage][i], plan_.fast), 64);
    }
    product(p, plan_.fast, at, form_bytes(plan_.forms[stage][p.form], plan_.fast), rows_, n0, n1, out);
  }

  // What of the range [n0, n1) over several matrices side by side falls to the one that begins at `first`.
  void part(const Projection& p, int stage, int n0, int n1, int first, float* rows) const {
    n0 = std::max(n0 - first, 0);
    n1 = std::min(n1 - first, p.n);
    if (n0 < n1) {
      float* out[kMaxRows];
      for (int i = 0; i < rows_; i++) {
        out[i] = rows + int64_t{i} * p.n + n0;
      }
      multiply(p, stage, n0, n1, out);
    }
  }

  void gate(int n0, int n1) const {
    int n = n1 - n0;
    auto* scratch = static_cast<float*>(thread_scratch(0, size_t(rows_) * 2 * size_t(n) * 4));
    float *gates[kMaxRows], *ups[kMaxRows];
    for (int i = 0; i < rows_; i++) {
      gates[i] = scratch + int64_t{i} * n;
      ups[i] = scratch + int64_t{rows_ + i} * n;
    }
    multiply(plan_.gate, 2, n0, n1, gates);
    multiply(plan_.up, 2, n0, n1, ups);
    for (int i = 0; i < rows_; i++) {
      ops().gate(plan_.activation, gated_ + int64_t{i} * plan_.inner + n0, gates[i], ups[i], n, 0, 0);
    }
  }

  // Adds a projection to the residual stream, which `out` holds.
  void add_product(const Projection& p, int stage, const NormPlan& post) {
    auto add = [&](int i, int n0, int n) {
      float* result = results_ + int64_t{i} * plan_.hidden + n0;
      ops().blend_row(call_.out + int64_t{i} * plan_.hidden + n0, 1, result, plan_.residual_scale, n);
    };
    sweep(p.n, p.row_bytes(), [&](int n0, int n1) {
      part(p, stage, n0, n1, 0, results_);
      for (int i = 0; i < rows_ && !post.weight; i++) {
        add(i, n0, n1 - n0);
      }
    });
    for (int i = 0; i < rows_ && post.weight; i++) {
      float* result = results_ + int64_t{i} * plan_.hidden;
      norm_row(post, result, result, plan_.hidden);
      add(i, 0, plan_.hidden);
    }
  }

  void* cached(void* cache, int b, int head, int slot) const {
    int64_t at = ((int64_t{b} * plan_.kv_heads + head) * call_.order.capacity + slot) * plan_.head_dim;
    return offset(cache, call_.cache_type, at);
  }

  // One head of one row: norm, then rotation, or the other way round.
  void rotate_head(float* to, float* from, const NormPlan& norm, const Angles* angles, int l) const {
    int dim = plan_.head_dim, turned = plan_.rope_dims;
    bool per_head = norm.weight && !plan_.whole_width_norms;
    if (per_head && !plan_.norms_after_rope) {
      norm_row(norm, from, from, dim);
    }
    if (plan_.rope_multiplier != 1) {
      ops().scale_row(from, plan_.rope_multiplier, turned);
    }
    if (angles) {
      ops().rope(to, from, angles->cosines(l), angles->sines(l), turned / 2, plan_.rope_interleaved, false);
    }
    std::copy(from + turned, from + dim, to + turned);
    if (per_head && plan_.norms_after_rope) {
      norm_row(norm, to, to, dim);
    }
  }

  // A head's key or value into the cache. Numbers beyond 16 bits become the largest: an infinity would make no number of
  // every later result.
  void store(void* to, float* from) const {
    if (call_.cache_type == Float::f16) {
      for (int i = 0; i < plan_.head_dim; i++) {
        from[i] = std::clamp(from[i], -65504.0f, 65504.0f);
      }
    }
    ops().from_f32(to, call_.cache_type, from, plan_.head_dim);
  }

  // Queries go, scaled, to where attention reads them; keys and values into the cache.
  void rotate() {
    std::shared_ptr<const Angles> angles[kMaxRows];
    for (int b = 0; b < call_.batch && plan_.rope_dims; b++) {
      int offset = call_.offset - (call_.first_slots ? call_.first_slots[b] : 0);
      bool same = b > 0 && angles[b - 1]->offset == offset;
      angles[b] = same ? angles[b - 1] : angles_for(offset, call_.length, plan_.rope_scale, plan_.inverse_freqs);
    }
    int dim = plan_.head_dim;
    each_row(plan_.q.n * 2, [&](int i) {
      int b = i / call_.length, l = i % call_.length, slot = call_.order.slot(call_.offset + l);
      float *q = q_ + int64_t{i} * plan_.q.n, *k = k_ + int64_t{i} * plan_.k.n, *v = v_ + int64_t{i} * plan_.v.n;
      if (plan_.whole_width_norms && plan_.q_norm.weight) {
        norm_row(plan_.q_norm, q, q, plan_.q.n);
      }
      if (plan_.whole_width_norms && plan_.k_norm.weight) {
        norm_row(plan_.k_norm, k, k, plan_.k.n);
      }
      for (int h = 0; h < plan_.heads; h++) {
        float* to = queries_ + ((int64_t{b} * plan_.heads + h) * call_.length + l) * dim;
        rotate_head(to, q + h * dim, plan_.q_norm, angles[b].get(), l);
        ops().scale_row(to, plan_.attention_scale, dim);
      }
      for (int h = 0; h < plan_.kv_heads; h++) {
        // Where the row's queries were, which are no longer needed.
        rotate_head(q, k + h * dim, plan_.k_norm, angles[b].get(), l);
        store(cached(call_.keys, b, h, slot), q);
        store(cached(call_.values, b, h, slot), v + h * dim);
      }
    });
  }

  const DecoderPlan& plan_;
  const DecoderCall& call_;
  int rows_;
  CachedAttention attention_;
  char* prepared_ = nullptr;
  float *normed_, *results_, *q_, *k_, *v_, *queries_, *attended_, *parts_, *gated_;
};

} // namespace

int64_t Projection::row_bytes() const {
  if (!quantized) {
    return int64_t{k} * bytes_of(plain_type);
  }
  return int64_t{k} * w.bits / 8 + (w.fp4 ? 1 : 2) * int64_t{k / w.group} * scale_bytes(w.type);
}

void finish_plan(DecoderPlan& plan) {
  Projection* stages[4][3] = {{&plan.q, &plan.k, &plan.v}, {&plan.o}, {&plan.gate, &plan.up}, {&plan.down}};
  for (int stage = 0; stage < 4; stage++) {
    auto& forms = plan.forms[stage];
    for (Projection* p : stages[stage]) {
      if (!p || p->n == 0) {
        continue;
      }
      auto found = std::find_if(forms.begin(), forms.end(), [&](const Projection& f) { return same_form(f, *p); });
      p->form = static_cast<int>(found - forms.begin());
      if (found == forms.end()) {
        forms.push_back(*p);
      }
    }
  }
}

void run_decoder_layer(const DecoderPlan& plan, const DecoderCall& call) {
  Run run(plan, call);
  run();
}

} // namespace edger1
