#include <memory>
#include <numeric>

#include "dense_driver.h"
#include "experts_plan.h"
#include "few_rows.h"

namespace edger1 {
namespace {

constexpr int64_t kBlockFloats = 16 << 20; // of a temporary matrix: columns are taken in blocks of so many elements

class ManyRows {
 public:
  ManyRows(const ExpertsPlan& plan, const ExpertsCall& call, ExpertGroups& groups)
      : plan_(plan), call_(call), groups_(groups), pairs_(call.rows * call.ranks), order_(static_cast<size_t>(pairs_)) {
    std::iota(order_.begin(), order_.end(), 0);
    for (int64_t pair : groups.pairs) {
      tokens_.push_back(pair / call.ranks);
    }
  }

  void operator()() {
    auto hidden = floats(pairs_ * plan_.inner);
    // Down waits for all: its int8 form looks for the largest channels in all rows.
    ArrivingGroups arriving(groups_, call_.arrivals, false);
    while (auto range = arriving.next()) {
      into_hidden(*range, hidden.get());
    }
    GroupRange all{0, groups_.groups.size()};
    if (!call_.weights) {
      product(plan_.down, all, hidden.get(), plan_.inner, order_, groups_.pairs, 0, plan_.hidden, call_.out);
      return;
    }
    int64_t block = columns_of_block(plan_.hidden, pairs_);
    auto parts = floats(pairs_ * block);
    for (int64_t n = 0; n < plan_.hidden; n += block) {
      auto width = static_cast<int>(std::min(block, plan_.hidden - n));
      product(plan_.down, all, hidden.get(), plan_.inner, order_, groups_.pairs, static_cast<int>(n),
              static_cast<int>(n) + width, parts.get());
      parallel_ranges(call_.rows, grain_for(call_.rows, double(width) * call_.ranks, 16384), [&](int64_t t, int64_t end) {
        for (; t < end; t++) {
          sum_ranks(call_.out + t * plan_.hidden + n, parts.get() + t * call_.ranks * width, width,
                    call_.weights + t * call_.ranks, call_.ranks, width);
        }
      });
    }
  }

 private:
  static std::unique_ptr<float[]> floats(int64_t n) {
    return std::unique_ptr<float[]>(new float[static_cast<size_t>(n)]);
  }

  static int64_t columns_of_block(int64_t columns, int64_t rows) {
    return std::min(columns, padded(std::max<int64_t>(kBlockFloats / rows, 1), 256));
  }

  // Row i of `hidden` belongs to groups_.pairs[i].
  void into_hidden(GroupRange range, float* hidden) {
    bool has_gate = plan_.gate.present();
    int64_t block = columns_of_block(plan_.inner, pairs_ * (has_gate ? 2 : 1));
    auto ups = floats(pairs_ * block), gates = floats(has_gate ? pairs_ * block : 0);
    for (int64_t n = 0; n < plan_.inner; n += block) {
      int n0 = static_cast<int>(n), n1 = static_cast<int>(std::min<int64_t>(n + block, plan_.inner)), width = n1 - n0;
      if (has_gate) {
        product(plan_.gate, range, call_.x, call_.x_stride, tokens_, order_, n0, n1, gates.get());
      }
      product(plan_.up, range, call_.x, call_.x_stride, tokens_, order_, n0, n1, ups.get());
      for_rows(range, width, 4096, [&](const auto&, int64_t i) {
        activate(plan_, plan_.activation, hidden + i * plan_.inner + n0, gates.get() + i * width, ups.get() + i * width,
                 width);
      });
    }
  }

  // Calls body(group, i) for each pair of some groups.
  template <class Body>
  void for_rows(GroupRange range, double cost, double cost_floor, Body&& body) {
    std::vector<int64_t> begin{0};
    for (size_t g = range.first; g < range.last; g++) {
      begin.push_back(begin.back() + groups_.groups[g].end - groups_.groups[g].begin);
    }
    parallel_ranges(begin.back(), grain_for(begin.back(), cost, cost_floor), [&](int64_t i, int64_t end) {
      auto at = static_cast<size_t>(std::upper_bound(begin.begin(), begin.end(), i) - begin.begin()) - 1;
      for (; i < end; i++) {
        at += i == begin[at + 1] ? 1 : 0;
        const auto& group = groups_.groups[range.first + at];
        body(group, group.begin + i - begin[at]);
      }
    });
  }

  // Row `places[i]` of out (n1 - n0 columns each) = row `sources[i]` of x times rows [n0, n1) of the i-th pair's expert, for
  // the pairs of some groups.
  void product(const ExpertProjection& p, GroupRange range, const float* x, int64_t x_stride, const std::vector<int64_t>& sources,
               const std::vector<int64_t>& places, int n0, int n1, float* out) {
    if (p.form.quantized) {
      quantized(p, range, x, x_stride, sources, places, n0, n1, out);
    } else {
      plain(p, range, x, x_stride, sources, places, n0, n1, out);
    }
    if (p.at[0].bias != nullptr) {
      for_rows(range, n1 - n0, 16384, [&](const auto& group, int64_t i) {
        float* row = out + places[static_cast<size_t>(i)] * (n1 - n0);
        p.add_bias(group.expert, &row, 1, n0, n1);
      });
    }
  }

  void quantized(const ExpertProjection& p, GroupRange range, const float* x, int64_t x_stride, const std::vector<int64_t>& sources,
                 const std::vector<int64_t>& places, int n0, int n1, float* out) {
    QmmJob job;
    job.fast = plan_.fast;
    job.x.data = x;
    int64_t rows = *std::max_element(sources.begin(), sources.end()) + 1;
    for (int64_t i = 0; i < rows; i++) {
      job.x.offsets.push_back(i * x_stride);
    }
    job.x_rows = sources;
    job.out_rows = places;
    job.out = out;
    job.out_columns = n1 - n0;
    for (size_t g = range.first; g < range.last; g++) {
      const auto& group = groups_.groups[g];
      QuantMatrix w = p[group.expert].w;
      w.codes += n0 * w.row_bytes;
      w.scales = static_cast<const char*>(w.scales) + n0 * w.scale_stride;
      w.biases = w.biases ? static_cast<const char*>(w.biases) + n0 * w.bias_stride : nullptr;
      w.n = n1 - n0;
      job.groups.push_back({w, group.begin, group.end});
    }
    run_qmm(job);
  }

  void plain(const ExpertProjection& p, GroupRange range, const float* x, int64_t x_stride, const std::vector<int64_t>& sources,
             const std::vector<int64_t>& places, int n0, int n1, float* out) {
    int width = n1 - n0, k = p.form.k;
    auto from = floats(groups_.largest * k), to = floats(groups_.largest * width);
    for (size_t g = range.first; g < range.last; g++) {
      const auto& group = groups_.groups[g];
      int64_t m = group.end - group.begin;
      for (int64_t i = 0; i < m; i++) {
        std::memcpy(&from[i * k], x + sources[static_cast<size_t>(group.begin + i)] * x_stride, size_t(k) * 4);
      }
      Projection w = p[group.expert];
      Matrix a{from.get(), Float::f32, k, 1};
      Matrix b{offset(w.plain, w.plain_type, n0 * w.plain_stride), w.plain_type, 1, w.plain_stride};
      matmul(to.get(), width, a, b, nullptr, m, width, k);
      for (int64_t i = 0; i < m; i++) {
        std::memcpy(out + places[static_cast<size_t>(group.begin + i)] * width, &to[i * width], size_t(width) * 4);
      }
    }
  }

  const ExpertsPlan& plan_;
  const ExpertsCall& call_;
  ExpertGroups& groups_;
  int64_t pairs_;
  std::vector<int64_t> order_, tokens_;
};

} // namespace

void run_many_rows(const ExpertsPlan& plan, const ExpertsCall& call, ExpertGroups& groups) {
  ManyRows run(plan, call, groups);
  run();
}

} // namespace edger1
