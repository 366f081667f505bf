#include "prefill_run.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <vector>

#include "attention_driver.h"
#include "cpu_features.h"
#include "pool.h"
#include "prefill_tiles.h"
#include "qmm_driver.h"
#include "rope.h"

namespace edger1 {
namespace {

constexpr int kPartRows = 256;   // rows that are packed for a product at a time: in bf16, they stay in the second cache
constexpr int kLeastRows = 128;  // rows for which unpacking a panel of W is worth it
constexpr int kPackRows = 24;    // rows that one piece of work packs at least

const TileOps* tiles_for(const DecoderPlan& plan) {
  return plan.fast && active_isa_has_amx() ? tile_ops() : nullptr;
}

// Rows packed for the products of one stage, once for each form that its matrices want.
class PackedRows {
 public:
  // Needs bytes() of memory at `memory`.
  PackedRows(const DecoderPlan& plan, int stage) : plan_(plan), forms_(plan.forms[stage]) {
    tile_ = plan.fast ? qmm_kernels().tile_fast : qmm_kernels().tile_exact;
    outliers_wanted_ = plan.fast && !active_isa_has_amx();
  }

  int tile() const {
    return tile_;
  }
  int64_t tile_bytes(int form) const {
    return qmm_kernels().packed_x_bytes(forms_[form].w, plan_.fast);
  }
  int64_t bytes(int rows) const {
    int64_t total = 0;
    for (size_t form = 0; form < forms_.size(); form++) {
      total += form_bytes(static_cast<int>(form), rows);
    }
    return total;
  }
  void place(void* memory, int rows) {
    memory_ = static_cast<char*>(memory);
    rows_ = rows;
  }
  char* at(int form, int row) const {
    char* start = memory_;
    for (int i = 0; i < form; i++) {
      start += form_bytes(i, rows_);
    }
    return start + row / tile_ * tile_bytes(form);
  }
  const int* outliers() const {
    return outliers_;
  }

  // Row i of the input is at(i), of which `fetch(i, buffer)` may make a copy in the buffer.
  template <class Fetch>
  void pack(Fetch&& fetch) {
    int k = forms_[0].k;
    if (outliers_wanted_) {
      find_outliers(k, fetch);
    }
    int step = (kPackRows + tile_ - 1) / tile_ * tile_;
    parallel_for((rows_ + step - 1) / step, [&](int64_t piece) {
      auto* buffer = static_cast<float*>(thread_scratch(0, size_t(tile_) * size_t(k) * 4));
      int last = std::min<int>(rows_, static_cast<int>(piece + 1) * step);
      for (int row = static_cast<int>(piece) * step; row < last; row += tile_) {
        const float* x[32];
        int count = std::min(tile_, last - row);
        for (int i = 0; i < count; i++) {
          x[i] = fetch(row + i, buffer + int64_t{i} * k);
        }
        for (size_t form = 0; form < forms_.size(); form++) {
          char* to = at(static_cast<int>(form), row);
          plan_.fast ? qmm_kernels().pack_x_fast(forms_[form].w, x, count, outliers_, to)
                     : qmm_kernels().pack_x_exact(forms_[form].w, x, count, to);
        }
      }
    });
  }

 private:
  int64_t form_bytes(int form, int rows) const {
    return padded((rows + tile_ - 1) / tile_ * tile_bytes(form), 64);
  }

  // The channels with the largest |x| over all rows; of equals the first.
  template <class Fetch>
  void find_outliers(int k, Fetch& fetch) {
    constexpr int step = 64;
    int parts = (rows_ + step - 1) / step;
    std::vector<float> largest(static_cast<size_t>(parts) * static_cast<size_t>(k), 0.0f);
    parallel_for(parts, [&](int64_t part) {
      auto* buffer = static_cast<float*>(thread_scratch(0, size_t(k) * 4));
      for (int row = static_cast<int>(part) * step; row < std::min(rows_, static_cast<int>(part + 1) * step); row++) {
        qmm_kernels().raise_to(fetch(row, buffer), k, &largest[static_cast<size_t>(part * k)]);
      }
    });
    for (int part = 1; part < parts; part++) {
      qmm_kernels().raise_to(&largest[size_t(part) * size_t(k)], k, largest.data());
    }
    std::vector<int> order(static_cast<size_t>(k));
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + kOutliers, order.end(), [&](int a, int b) {
      return largest[size_t(a)] != largest[size_t(b)] ? largest[size_t(a)] > largest[size_t(b)] : a < b;
    });
    std::copy(order.begin(), order.begin() + kOutliers, outliers_);
    std::sort(outliers_, outliers_ + kOutliers);
  }

  const DecoderPlan& plan_;
  const std::vector<Projection>& forms_;
  int tile_ = 0, rows_ = 0;
  bool outliers_wanted_ = false;
  char* memory_ = nullptr;
  int outliers_[kOutliers] = {};
};

// Some of the packed rows.
struct RowRange {
  int begin, end;

  int count() const {
    return end - begin;
  }
};

class Prefill {
 public:
  Prefill(const DecoderPlan& plan, const PrefillCall& call)
      : plan_(plan), call_(call), rows_(call.batch * call.length), tiles_(tiles_for(plan)) {}

  void queries() {
    PackedRows packed(plan_, 0);
    int part_rows = std::min(rows_, kPartRows);
    packed.place(thread_scratch(1, size_t(packed.bytes(part_rows))), part_rows);
    auto angles = angles_for(call_.offset, call_.length, plan_.rope_scale, plan_.inverse_freqs);
    int units = plan_.heads + 2 * plan_.kv_heads;
    for (int first = 0; first < rows_; first += kPartRows) {
      int count = begin_part(packed, first);
      packed.pack([&](int row, float* buffer) { return normed(plan_.attention_norm, call_.x, first + row, buffer); });
      each_piece(units, count, packed.tile(), [&](int unit, RowRange rows) {
        head_of_unit(packed, unit, rows, first, *angles);
      });
    }
  }

  void rest() {
    PackedRows attended(plan_, 1), normed_rows(plan_, 2), gated(plan_, 3);
    int part_rows = std::min(rows_, kPartRows);
    int64_t packed_bytes = std::max({attended.bytes(part_rows), normed_rows.bytes(part_rows)});
    int64_t gated_bytes = padded(gated.bytes(part_rows), 64);
    // Gates go straight to where they are packed where that needs no look at all of them.
    gate_floats_ = tiles_ ? 0 : int64_t{part_rows} * plan_.inner;
    int64_t all_heads = int64_t{rows_} * plan_.heads * plan_.head_dim;
    bool post = plan_.attention_post_norm.weight || plan_.mlp_post_norm.weight;
    int64_t post_floats = post ? int64_t{part_rows} * plan_.hidden : 0;
    auto* memory = static_cast<char*>(
        thread_scratch(1, size_t(packed_bytes + gated_bytes + 4 * (gate_floats_ + all_heads + post_floats) + 256)));
    gates_ = reinterpret_cast<float*>(memory + packed_bytes + gated_bytes);
    attended_ = gates_ + padded(gate_floats_, 16);
    post_ = attended_ + padded(all_heads, 16);
    attend();
    for (int first = 0; first < rows_; first += kPartRows) {
      for (PackedRows* p : {&attended, &normed_rows}) {
        p->place(memory, part_rows);
      }
      gated.place(memory + packed_bytes, part_rows);
      int count = begin_part(attended, first);
      begin_part(normed_rows, first);
      begin_part(gated, first);
      int width = plan_.heads * plan_.head_dim;
      attended.pack([&](int row, float*) { return attended_ + int64_t{first + row} * width; });
      add_product(attended, plan_.o, plan_.attention_post_norm, call_.x, first, count);
      normed_rows.pack([&](int row, float* buffer) { return normed(plan_.mlp_norm, call_.out, first + row, buffer); });
      each_piece((plan_.inner + kPanel - 1) / kPanel, count, normed_rows.tile(),
                 [&](int panel, RowRange rows) { gate(normed_rows, gated, panel, rows); });
      if (!tiles_) {
        gated.pack([&](int row, float*) { return gates_ + int64_t{row} * plan_.inner; });
      }
      add_product(gated, plan_.down, plan_.mlp_post_norm, call_.out, first, count);
    }
  }

 private:
  // Sets how many rows the part has that begins at row `first`.
  int begin_part(PackedRows& packed, int first) const {
    int count = std::min(kPartRows, rows_ - first);
    packed.place(packed.at(0, 0), count);
    return count;
  }

  // Calls body(column unit, rows) for all units and rows of a part. Few units and many threads: rows are split as well,
  // though each piece unpacks W again.
  template <class Body>
  void each_piece(int units, int count, int tile, Body&& body) const {
    int pieces = std::min((3 * pool_threads() + units - 1) / units, std::max(count / kLeastRows, 1));
    int step = ((count + pieces - 1) / pieces + tile - 1) / tile * tile;
    pieces = (count + step - 1) / step;
    parallel_for(int64_t{units} * pieces, [&](int64_t i) {
      int begin = static_cast<int>(i % pieces) * step;
      body(static_cast<int>(i / pieces), RowRange{begin, std::min(begin + step, count)});
    });
  }

  const float* normed(const NormPlan& norm, const float* x, int row, float* buffer) const {
    ops().rms_norm(buffer, x + int64_t{row} * plan_.hidden, norm.weight, plan_.hidden, norm.eps);
    return buffer;
  }

  int64_t panel_bytes(const Projection& p) const {
    return padded(qmm_kernels().panel_scratch_bytes(p.w, plan_.fast), 64);
  }

  // Columns [n0, n1) of a product, at most a panel; with the bias.
  void product(const PackedRows& packed, const Projection& p, RowRange rows, int n0, int n1, float* out, int stride,
               void* scratch) const {
    const char* x = packed.at(p.form, rows.begin);
    if (plan_.fast) {
      qmm_kernels().panel_fast(p.w, x, rows.count(), n0, n1, out, stride, packed.outliers(), scratch);
    } else {
      qmm_kernels().panel_exact(p.w, x, rows.count(), n0, n1, out, stride, scratch);
    }
    for (int i = 0; i < rows.count() && p.bias; i++) {
      ops().blend_row(out + int64_t{i} * stride, 1, p.bias + n0, 1, n1 - n0);
    }
  }

  // One head of queries, keys or values: product, norm, rotation, and to where it belongs.
  void head_of_unit(const PackedRows& packed, int unit, RowRange rows, int first, const Angles& angles) const {
    int dim = plan_.head_dim, heads = plan_.heads, kv_heads = plan_.kv_heads;
    bool query = unit < heads, key = !query && unit < heads + kv_heads;
    const Projection& p = query ? plan_.q : key ? plan_.k : plan_.v;
    int head = query ? unit : key ? unit - heads : unit - heads - kv_heads;
    int64_t scratch_bytes = panel_bytes(p);
    auto* scratch = static_cast<char*>(thread_scratch(0, size_t(scratch_bytes + int64_t{rows.count()} * dim * 4)));
    auto* found = reinterpret_cast<float*>(scratch + scratch_bytes);
    for (int n = 0; n < dim; n += kPanel) {
      product(packed, p, rows, head * dim + n, head * dim + std::min(n + kPanel, dim), found + n, dim, scratch);
    }
    for (int i = 0; i < rows.count(); i++) {
      int row = first + rows.begin + i, b = row / call_.length, l = row % call_.length;
      float* from = found + int64_t{i} * dim;
      if (query) {
        float* to = call_.queries + ((int64_t{b} * heads + head) * call_.length + l) * dim;
        rotate(to, from, plan_.q_norm, angles, l);
      } else {
        int64_t to = ((int64_t{b} * kv_heads + head) * call_.capacity + call_.offset + l) * dim;
        if (key) {
          rotate(call_.keys + to, from, plan_.k_norm, angles, l);
        } else {
          std::memcpy(call_.values + to, from, size_t(dim) * 4);
        }
      }
    }
  }

  void rotate(float* to, float* from, const NormPlan& norm, const Angles& angles, int l) const {
    if (norm.weight) {
      ops().rms_norm(from, from, norm.weight, plan_.head_dim, norm.eps);
    }
    if (plan_.rope_multiplier != 1) {
      ops().scale_row(from, plan_.rope_multiplier, plan_.rope_dims);
    }
    ops().rope(to, from, angles.cosines(l), angles.sines(l), plan_.rope_dims / 2, plan_.rope_interleaved, false);
    std::copy(from + plan_.rope_dims, from + plan_.head_dim, to + plan_.rope_dims);
  }

  void attend() const {
    int dim = plan_.head_dim, group = plan_.heads / plan_.kv_heads;
    if (!tiles_) {
      AttentionJob job{};
      job.batch = call_.batch;
      job.heads = plan_.heads;
      job.kv_heads = plan_.kv_heads;
      job.length = call_.length;
      job.keys = call_.offset + call_.length;
      job.dim = job.value_dim = dim;
      job.scale = plan_.attention_scale;
      job.causal = true;
      int64_t q_row = int64_t{call_.length} * dim, kv_row = int64_t{call_.capacity} * dim;
      job.q = {call_.queries, Float::f32, plan_.heads * q_row, q_row, dim};
      job.k = {call_.keys, Float::f32, plan_.kv_heads * kv_row, kv_row, dim};
      job.v = {call_.values, Float::f32, plan_.kv_heads * kv_row, kv_row, dim};
      job.out = attended_;
      run_attention(job);
      return;
    }
    int step = tiles_->slice_length(group), slices = (call_.length + step - 1) / step;
    parallel_for(int64_t{call_.batch} * plan_.kv_heads * slices, [&](int64_t task) {
      // The last slices see the most keys: they go first.
      int pairs = call_.batch * plan_.kv_heads, pair = static_cast<int>(task % pairs);
      int begin = (slices - 1 - static_cast<int>(task / pairs)) * step;
      int b = pair / plan_.kv_heads, kv = pair % plan_.kv_heads;
      AttentionSlice slice;
      slice.head_stride = int64_t{call_.length} * dim;
      slice.queries = call_.queries + (int64_t{b} * plan_.heads + kv * group) * slice.head_stride + int64_t{begin} * dim;
      slice.group = group;
      slice.length = std::min(step, call_.length - begin);
      slice.first = call_.offset + begin;
      slice.dim = dim;
      slice.scale = plan_.attention_scale;
      slice.keys = call_.keys + int64_t{pair} * call_.capacity * dim;
      slice.values = call_.values + int64_t{pair} * call_.capacity * dim;
      slice.out_stride = int64_t{plan_.heads} * dim;
      slice.out = attended_ + (int64_t{b} * call_.length + begin) * slice.out_stride + int64_t{kv} * group * dim;
      tiles_->attend(slice, thread_scratch(0, size_t(tiles_->slice_bytes(group, slice.length, dim))));
    });
  }

  void gate(const PackedRows& packed, const PackedRows& gated, int panel, RowRange rows) const {
    int n0 = panel * kPanel, n1 = std::min(n0 + kPanel, plan_.inner), n = n1 - n0;
    int64_t scratch_bytes = std::max(panel_bytes(plan_.gate), panel_bytes(plan_.up));
    int64_t block = int64_t{rows.count()} * kPanel;
    auto* scratch = static_cast<char*>(thread_scratch(0, size_t(scratch_bytes + 2 * block * 4)));
    auto* gates = reinterpret_cast<float*>(scratch + scratch_bytes);
    float* ups = gates + block;
    product(packed, plan_.gate, rows, n0, n1, gates, kPanel, scratch);
    if (tiles_) {
      tiles_->product_gate(plan_.up.w, plan_.up.bias, packed.at(plan_.up.form, rows.begin), rows.count(), n0, n1,
                           plan_.activation, gates, gated.at(0, rows.begin), gated.tile_bytes(0), scratch);
      return;
    }
    product(packed, plan_.up, rows, n0, n1, ups, kPanel, scratch);
    for (int i = 0; i < rows.count(); i++) {
      ops().gate(plan_.activation, gates_ + int64_t{rows.begin + i} * plan_.inner + n0, gates + int64_t{i} * kPanel,
                 ups + int64_t{i} * kPanel, n, 0, 0);
    }
  }

  // out = base + residual_scale * post(product) for the rows of a part.
  void add_product(const PackedRows& packed, const Projection& p, const NormPlan& post, const float* base, int first,
                   int count) const {
    int64_t scratch_bytes = panel_bytes(p);
    each_piece((p.n + kPanel - 1) / kPanel, count, packed.tile(), [&](int panel, RowRange rows) {
      int n0 = panel * kPanel, n1 = std::min(n0 + kPanel, p.n);
      auto* scratch = static_cast<char*>(thread_scratch(0, size_t(scratch_bytes + int64_t{rows.count()} * kPanel * 4)));
      if (tiles_ && !post.weight) {
        int64_t at = int64_t{first + rows.begin} * plan_.hidden + n0;
        tiles_->product_add(p.w, p.bias, packed.at(p.form, rows.begin), rows.count(), n0, n1, base + at,
                            plan_.residual_scale, call_.out + at, plan_.hidden, scratch);
        return;
      }
      auto* found = reinterpret_cast<float*>(scratch + scratch_bytes);
      product(packed, p, rows, n0, n1, found, kPanel, scratch);
      for (int i = 0; i < rows.count(); i++) {
        const float* from = found + int64_t{i} * kPanel;
        int row = rows.begin + i;
        if (post.weight) {
          std::memcpy(post_ + int64_t{row} * plan_.hidden + n0, from, size_t(n1 - n0) * 4);
        } else {
          add_row(first + row, base, from, n0, n1 - n0);
        }
      }
    });
    if (!post.weight) {
      return;
    }
    parallel_ranges(count, kPackRows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        float* found = post_ + row * plan_.hidden;
        ops().rms_norm(found, found, post.weight, plan_.hidden, post.eps);
        add_row(first + static_cast<int>(row), base, found, 0, plan_.hidden);
      }
    });
  }

  void add_row(int row, const float* base, const float* from, int n0, int n) const {
    int64_t at = int64_t{row} * plan_.hidden + n0;
    if (base != call_.out) {
      std::memcpy(call_.out + at, base + at, size_t(n) * 4);
    }
    ops().blend_row(call_.out + at, 1, from, plan_.residual_scale, n);
  }

  const DecoderPlan& plan_;
  const PrefillCall& call_;
  int rows_;
  const TileOps* tiles_;
  int64_t gate_floats_ = 0;
  float *gates_ = nullptr, *attended_ = nullptr, *post_ = nullptr;
};

} // namespace

bool prefill_covers(const DecoderPlan& plan) {
  for (const Projection* p : {&plan.q, &plan.k, &plan.v, &plan.o, &plan.gate, &plan.up, &plan.down}) {
    if (!p->quantized || p->w.n == 0) {
      return false;
    }
  }
  for (const NormPlan* norm : {&plan.attention_norm, &plan.q_norm, &plan.k_norm, &plan.attention_post_norm,
                               &plan.mlp_norm, &plan.mlp_post_norm}) {
    if (norm->centered || norm->bias) {
      return false;
    }
  }
  return plan.hidden >= kOutliers && plan.has_mlp && plan.residual && !plan.parallel && !plan.whole_width_norms &&
      !plan.norms_after_rope && !plan.sinks && plan.soft_cap == 0 && plan.rope_dims > 0 && plan.attention_norm.weight &&
      plan.mlp_norm.weight;
}

void prefill_queries(const DecoderPlan& plan, const PrefillCall& call) {
  Prefill(plan, call).queries();
}

void prefill_rest(const DecoderPlan& plan, const PrefillCall& call) {
  Prefill(plan, call).rest();
}

} // namespace edger1
