#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>

#include "decoder_plan.h"
#include "pool.h"
#include "qmm_driver.h"
#include "rope.h"
#include "split.h"

namespace edger1 {
namespace {

constexpr int64_t kRangeBytes = 8 << 10;     // weights below which splitting further costs more than it gains
constexpr int64_t kSerialRows = 1 << 11;     // elements up to which rows are not worth a phase
constexpr double kLeastAttention = 1 << 16;  // operations below which splitting attention further gains nothing
constexpr int64_t kAheadBytes = 32 << 10;    // what a waiting thread reads of each matrix

// Layers one after the other, each in phases; see Stage.
class Run : public Course {
 public:
  Run(const DecoderPlan* const* plans, const DecoderCall* calls, int layers)
      : plans_(plans), calls_(calls), layers_(layers), rows_(calls[0].batch * calls[0].length) {
    int64_t prepared = 0, areas[kAreas] = {};
    for (int layer = 0; layer < layers; layer++) {
      const DecoderPlan& plan = *plans[layer];
      for (const auto& forms : plan.forms) {
        int64_t bytes = 0;
        for (const auto& form : forms) {
          bytes += padded(rows_ * form.prepared_bytes(plan.fast), 64);
        }
        prepared = std::max(prepared, bytes);
      }
      int64_t q = int64_t{rows_} * plan.heads * plan.head_dim, kv = int64_t{rows_} * plan.kv_heads * plan.head_dim;
      int64_t hidden = int64_t{rows_} * plan.hidden;
      int64_t floats[kAreas] = {hidden, hidden, q, kv, kv, q, q, attention_of(plan, calls[layer]).scratch_floats(),
                                int64_t{rows_} * plan.inner};
      for (int i = 0; i < kAreas; i++) {
        areas[i] = std::max(areas[i], padded(floats[i], 16) + 16);
      }
    }
    int64_t total = prepared;
    for (int64_t n : areas) {
      total += n * 4;
    }
    prepared_ = static_cast<char*>(thread_scratch(1, static_cast<size_t>(total)));
    float** to[kAreas] = {&normed_, &results_, &q_, &k_, &v_, &queries_, &attended_, &parts_, &gated_};
    auto* at = reinterpret_cast<float*>(prepared_ + prepared);
    for (int i = 0; i < kAreas; i++) {
      *to[i] = at;
      at += areas[i];
    }
  }

  // Goes through the stages until one is worth all threads. What is done for each row alone is such a stage for many rows
  // only.
  int64_t next() override {
    for (;;) {
      if (stage_ == Stage::end || (stage_ == Stage::middle && !plan().has_mlp)) {
        stage_ = Stage::begin;
        layer_++;
      } else {
        stage_ = static_cast<Stage>(static_cast<int>(stage_) + 1);
      }
      if (layer_ == layers_) {
        return 0;
      }
      switch (stage_) {
        case Stage::begin:
          begin_layer();
          break;
        case Stage::project:
          attend_.emplace(attention_, parts_);
          read_ahead_scores();
          return split(plan().q.n + plan().k.n + plan().v.n, plan().q.row_bytes());
        case Stage::score:
          read_ahead(plan().o.n, {&plan().o});
          return split_scores().pieces;
        case Stage::merge:
          // A few are done with what follows for the row.
          merged_apart_ = static_cast<double>(attend_->merges()) * attend_->merge_cost() > kLeastAttention;
          if (merged_apart_) {
            return split_by_cost(attend_->merges(), attend_->merge_cost());
          }
          break;
        case Stage::output:
          if (plan().has_mlp) {
            read_ahead(plan().inner, {&plan().gate, &plan().up});
          } else {
            read_next_layer();
          }
          return split(plan().o.n, plan().o.row_bytes());
        case Stage::gate:
          read_ahead(plan().hidden, {&plan().down});
          return split(plan().inner, plan().gate.row_bytes() + plan().up.row_bytes());
        case Stage::down:
          read_next_layer();
          return split(plan().down.n, plan().down.row_bytes());
        default:
          if (rows_ > 1 && int64_t{rows_} * plan().hidden > kSerialRows) {
            return split(rows_, kRangeBytes);
          }
          for (int i = 0; i < rows_; i++) {
            row(i);
          }
      }
    }
  }

  void piece(int64_t i) override {
    int n0 = split_->bounds[i], n1 = split_->bounds[i + 1];
    if (n0 == n1) {
      return;
    }
    switch (stage_) {
      case Stage::project:
        part(plan().q, 0, n0, n1, 0, q_);
        part(plan().k, 0, n0, n1, plan().q.n, k_);
        part(plan().v, 0, n0, n1, plan().q.n + plan().k.n, v_);
        break;
      case Stage::score:
        for (int task = n0; task < n1; task++) {
          attend_->score(task, task + 1 < n1 ? task + 1 : -1);
        }
        break;
      case Stage::merge:
        for (int task = n0; task < n1; task++) {
          attend_->merge(task);
        }
        break;
      case Stage::output:
        add_product(plan().o, 1, plan().attention_post_norm, n0, n1);
        break;
      case Stage::gate:
        gate(n0, n1);
        break;
      case Stage::down:
        add_product(plan().down, 3, plan().mlp_post_norm, n0, n1);
        break;
      default:
        for (int r = n0; r < n1; r++) {
          row(r);
        }
    }
  }

 private:
  static constexpr int kAreas = 9;

  // In the order of a layer. Products and attention are shared by ranges of columns and of keys, all else by rows.
  enum class Stage { begin, enter, project, rotate, score, merge, leave, output, middle, gate, gated, down, end };

  const DecoderPlan& plan() const {
    return *plans_[layer_];
  }
  const DecoderCall& call() const {
    return calls_[layer_];
  }

  static CachedAttention attention_of(const DecoderPlan& plan, const DecoderCall& call) {
    CachedAttention attention;
    attention.batch = call.batch;
    attention.length = call.length;
    attention.heads = plan.heads;
    attention.kv_heads = plan.kv_heads;
    attention.dim = plan.head_dim;
    attention.keys = call.keys;
    attention.values = call.values;
    attention.type = call.cache_type;
    attention.format = call.format;
    attention.order = call.order;
    attention.first_slots = call.first_slots;
    attention.end = call.offset + call.length;
    attention.mask = call.mask;
    attention.sinks = plan.sinks;
    attention.soft_cap = plan.soft_cap;
    return attention;
  }

  void begin_layer() {
    attention_ = attention_of(plan(), call());
    attention_.queries = queries_;
    attention_.out = attended_;
    for (int b = 0; b < call().batch && plan().rope_dims; b++) {
      int offset = call().offset - (call().first_slots ? call().first_slots[b] : 0);
      auto fits = [&](const std::shared_ptr<const Angles>& a) {
        return a && a->offset == offset && a->length == call().length && a->scale == plan().rope_scale &&
            a->inverse_freqs == plan().inverse_freqs;
      };
      if (b > 0 && fits(angles_[b - 1])) {
        angles_[b] = angles_[b - 1];
      } else if (!fits(angles_[b])) {
        angles_[b] = angles_for(offset, call().length, plan().rope_scale, plan().inverse_freqs);
      }
    }
  }

  int64_t split(int n, int64_t item_bytes) {
    auto least = static_cast<int>(std::max<int64_t>(kRangeBytes / item_bytes, 1));
    split_ = &splits_[static_cast<int>(stage_)];
    split_->set(n, least);
    return split_->pieces;
  }

  int64_t split_by_cost(int64_t n, double cost) {
    split_ = &splits_[static_cast<int>(stage_)];
    split_->set(static_cast<int>(n), least_by_cost(n, cost));
    return split_->pieces;
  }

  static int least_by_cost(int64_t n, double cost) {
    return static_cast<int>(std::clamp(kLeastAttention / cost, 1.0, static_cast<double>(n)));
  }

  const Split& split_scores() {
    split_ = &splits_[static_cast<int>(Stage::score)];
    split_->set(static_cast<int>(attend_->scores()), least_by_cost(attend_->scores(), attend_->score_cost()));
    return *split_;
  }

  // Names the keys and values that threads begin with, where those of one thread lie as far from those of the next as any,
  // and where they are few what comes after them.
  void read_ahead_scores() {
    const Split& by_thread = split_scores();
    bool few = attend_->first_read(by_thread.bounds[0]).bytes < kAheadBytes / 2;
    read_ahead(few ? plan().o.n : 0, {&plan().o});
    for (bool values : {false, true}) {
      Ahead found = attend_->first_read(by_thread.bounds[0], values);
      found.bytes = std::min(found.bytes, kAheadBytes);
      for (int t = 1; t < pool_threads() && found.bytes; t++) {
        bool none = by_thread.bounds[t] == by_thread.bounds[t + 1];
        Ahead own = attend_->first_read(by_thread.bounds[none ? 0 : t], values);
        int64_t step = static_cast<const char*>(own.begin) - static_cast<const char*>(found.begin);
        if (t == 1) {
          found.step = step;
        }
        found.bytes = step == t * found.step ? std::min(found.bytes, own.bytes) : 0;
      }
      ahead[kAhead - 1 - values] = found;
    }
  }

  // Names the matrices of the phase after the one that begins, which splits `columns` of them.
  void read_ahead(int columns, std::initializer_list<const Projection*> matrices) {
    int i = 0;
    int64_t rows = int64_t{columns} * 3 / (4 * pool_threads());
    for (const Projection* p : matrices) {
      if (p->quantized) {
        int64_t bytes = std::min(rows * p->w.row_bytes, kAheadBytes), read = bytes / p->w.row_bytes;
        ahead[i++] = {p->w.codes, rows * p->w.row_bytes, bytes};
        ahead[i++] = {p->w.scales, rows * p->w.scale_stride, read * p->w.scale_stride};
        if (!p->w.fp4 && p->w.bias_ratio == 0) {
          ahead[i++] = {p->w.biases, rows * p->w.bias_stride, read * p->w.bias_stride};
        }
      }
    }
    while (i < kAhead) {
      ahead[i++] = {};
    }
  }

  void read_next_layer() {
    if (layer_ + 1 < layers_) {
      const DecoderPlan& then = *plans_[layer_ + 1];
      read_ahead(then.q.n + then.k.n + then.v.n, {&then.q});
    } else {
      read_ahead(0, {});
    }
  }

  // One row's part of a stage.
  void row(int i) {
    const DecoderPlan& plan = this->plan();
    const DecoderCall& call = this->call();
    float* out = call.out + int64_t{i} * plan.hidden;
    switch (stage_) {
      case Stage::enter:
        prepare(0, i, normalize(plan.attention_norm, call.x + i * call.x_stride, normed_, i));
        break;
      case Stage::rotate:
        rotate(i);
        break;
      case Stage::leave: {
        if (!merged_apart_) {
          merge(i);
        }
        prepare(1, i, attended_ + int64_t{i} * plan.q.n);
        const float* x = call.x + i * call.x_stride;
        if (plan.parallel && call.normed) {
          // What attention read, which its norm left in place.
          copy_row(call.normed + int64_t{i} * plan.hidden, plan.attention_norm.weight ? normed_ + int64_t{i} * plan.hidden : x);
        }
        if (!plan.residual) {
          std::fill_n(out, plan.hidden, 0.0f);
        } else if (out != x) {
          copy_row(out, x);
        }
        break;
      }
      case Stage::middle: {
        add_post(plan.attention_post_norm, i);
        const float* in = plan.attention_norm.weight ? normed_ + int64_t{i} * plan.hidden : call.x + i * call.x_stride;
        if (!plan.parallel && (plan.has_mlp || call.normed)) {
          in = normalize(plan.mlp_norm, out, call.normed ? call.normed : normed_, i);
          if (call.normed) {
            copy_row(call.normed + int64_t{i} * plan.hidden, in);
          }
        }
        if (plan.has_mlp) {
          prepare(2, i, in);
        }
        break;
      }
      case Stage::gated:
        prepare(3, i, gated_ + int64_t{i} * plan.inner);
        break;
      case Stage::end:
        add_post(plan.mlp_post_norm, i);
        break;
      default:
        break;
    }
  }

  void merge(int i) const {
    int b = i / call().length, l = i % call().length, group = plan().heads / plan().kv_heads;
    for (int h = 0; h < plan().heads; h++) {
      attend_->merge((int64_t{b} * plan().kv_heads * group + h) * call().length + l);
    }
  }

  void copy_row(float* to, const float* from) const {
    std::memcpy(to, from, size_t(plan().hidden) * 4);
  }

  // Row i normed, in its place in `to`; where there is no norm the row as it is.
  const float* normalize(const NormPlan& norm, const float* x, float* to, int i) const {
    if (!norm.weight) {
      return x;
    }
    float* row = to + int64_t{i} * plan().hidden;
    norm_row(norm, row, x, plan().hidden);
    return row;
  }

  static void norm_row(const NormPlan& norm, float* to, const float* from, int n) {
    if (norm.centered) {
      ops().layer_norm(to, from, norm.weight, norm.bias, n, norm.eps);
    } else {
      ops().rms_norm(to, from, norm.weight, n, norm.eps);
    }
  }

  // Row i in all forms of a matrix stage's input, which lie one after the other.
  void prepare(int stage, int i, const float* x) const {
    char* to = prepared_;
    for (const Projection& form : plan().forms[stage]) {
      int64_t bytes = form.prepared_bytes(plan().fast);
      if (form.quantized) {
        (plan().fast ? qmm_kernels().prepare_fast : qmm_kernels().prepare_exact)(form.w, x, to + i * bytes);
      } else {
        std::memcpy(to + i * bytes, x, static_cast<size_t>(form.k) * 4);
      }
      to += padded(rows_ * bytes, 64);
    }
  }

  void multiply(const Projection& p, int stage, int n0, int n1, float* const* out) const {
    const char* at = prepared_;
    for (int i = 0; i < p.form; i++) {
      at += padded(rows_ * plan().forms[stage][i].prepared_bytes(plan().fast), 64);
    }
    p.multiply(plan().fast, at, plan().forms[stage][p.form].prepared_bytes(plan().fast), rows_, n0, n1, out);
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
    multiply(plan().gate, 2, n0, n1, gates);
    multiply(plan().up, 2, n0, n1, ups);
    for (int i = 0; i < rows_; i++) {
      ops().gate(plan().activation, gated_ + int64_t{i} * plan().inner + n0, gates[i], ups[i], n, 0, 0);
    }
  }

  // Columns [n0, n1) of a projection, added to the residual stream, which `out` holds, unless a norm comes between.
  void add_product(const Projection& p, int stage, const NormPlan& post, int n0, int n1) const {
    part(p, stage, n0, n1, 0, results_);
    for (int i = 0; i < rows_ && !post.weight; i++) {
      add(i, n0, n1 - n0);
    }
  }

  void add_post(const NormPlan& post, int i) const {
    if (post.weight) {
      float* result = results_ + int64_t{i} * plan().hidden;
      norm_row(post, result, result, plan().hidden);
      add(i, 0, plan().hidden);
    }
  }

  void add(int i, int n0, int n) const {
    float* result = results_ + int64_t{i} * plan().hidden + n0;
    ops().blend_row(call().out + int64_t{i} * plan().hidden + n0, 1, result, plan().residual_scale, n);
  }

  void* cached(void* cache, int b, int head, int slot) const {
    int64_t row = (int64_t{b} * plan().kv_heads + head) * call().order.capacity + slot;
    return offset(cache, call().format.packed() ? Float::f32 : call().cache_type, row * call().format.words(plan().head_dim));
  }

  // One head of one row: norm, then rotation, or the other way round.
  void rotate_head(float* to, float* from, const NormPlan& norm, const Angles* angles, int l) const {
    int dim = plan().head_dim, turned = plan().rope_dims;
    bool per_head = norm.weight && !plan().whole_width_norms;
    if (per_head && !plan().norms_after_rope) {
      norm_row(norm, from, from, dim);
    }
    if (plan().rope_multiplier != 1) {
      ops().scale_row(from, plan().rope_multiplier, turned);
    }
    if (angles) {
      ops().rope(to, from, angles->cosines(l), angles->sines(l), turned / 2, plan().rope_interleaved, false);
    }
    std::copy(from + turned, from + dim, to + turned);
    if (per_head && plan().norms_after_rope) {
      norm_row(norm, to, to, dim);
    }
  }

  // A head's key or value into the cache. Numbers beyond 16 bits become the largest: an infinity would make no number of
  // every later result.
  void store(void* to, float* from) const {
    if (call().format.packed()) {
      pack_row(to, from, plan().head_dim, call().format);
      return;
    }
    if (call().cache_type == Float::f16) {
      for (int i = 0; i < plan().head_dim; i++) {
        from[i] = std::clamp(from[i], -65504.0f, 65504.0f);
      }
    }
    ops().from_f32(to, call().cache_type, from, plan().head_dim);
  }

  // Queries go, scaled, to where attention reads them; keys and values into the cache.
  void rotate(int i) const {
    int dim = plan().head_dim;
    int b = i / call().length, l = i % call().length, slot = call().order.slot(call().offset + l);
    float *q = q_ + int64_t{i} * plan().q.n, *k = k_ + int64_t{i} * plan().k.n, *v = v_ + int64_t{i} * plan().v.n;
    if (plan().whole_width_norms && plan().q_norm.weight) {
      norm_row(plan().q_norm, q, q, plan().q.n);
    }
    if (plan().whole_width_norms && plan().k_norm.weight) {
      norm_row(plan().k_norm, k, k, plan().k.n);
    }
    for (int h = 0; h < plan().heads; h++) {
      float* to = queries_ + ((int64_t{b} * plan().heads + h) * call().length + l) * dim;
      rotate_head(to, q + h * dim, plan().q_norm, angles_[b].get(), l);
      ops().scale_row(to, plan().attention_scale, dim);
    }
    for (int h = 0; h < plan().kv_heads; h++) {
      // Where the row's queries were, which are no longer needed.
      rotate_head(q, k + h * dim, plan().k_norm, angles_[b].get(), l);
      store(cached(call().keys, b, h, slot), q);
      store(cached(call().values, b, h, slot), v + h * dim);
    }
  }

  const DecoderPlan* const* plans_;
  const DecoderCall* calls_;
  int layers_, rows_;
  int layer_ = -1;
  Stage stage_ = Stage::end;
  Split splits_[static_cast<int>(Stage::end) + 1];
  Split* split_ = nullptr;
  std::shared_ptr<const Angles> angles_[kMaxRows];
  CachedAttention attention_;
  std::optional<Attend> attend_;
  bool merged_apart_ = false;
  char* prepared_ = nullptr;
  float *normed_, *results_, *q_, *k_, *v_, *queries_, *attended_, *parts_, *gated_;
};

} // namespace

void run_decoder_layers(const DecoderPlan* const* plans, const DecoderCall* calls, int count) {
  Run run(plans, calls, count);
  run_course(run);
}

} // namespace edger1
