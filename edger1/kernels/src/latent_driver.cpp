#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "latent_plan.h"
#include "pool.h"
#include "qmm_driver.h"

namespace edger1 {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int kBlockKeys = 256;                  // fixed, so that a row's result does not depend on how work is split
constexpr int kScoreStride = kBlockKeys + 16;    // rows a power of two apart would share few lines of the cache
constexpr int64_t kPartialBytes = 8 << 20;       // of results that wait to be merged

int64_t aligned(int64_t bytes) {
  return padded(bytes, 64);
}

// All heads of few rows. Pieces of work are blocks of keys, each packed once for all rows that meet it; their results
// are merged in the order of the blocks, some blocks at a time.
class FewRows {
 public:
  FewRows(const LatentPlan& plan, const LatentCall& call)
      : plan_(plan), call_(call), math_(latent_math(plan.tiles)), rows_(plan.heads * call.length),
        blocks_((call.keys + kBlockKeys - 1) / kBlockKeys), tile_(math_.row_tile), tiles_((rows_ + tile_ - 1) / tile_) {
    int64_t all = int64_t{call.batch} * rows_, latent_bytes = math_.a_bytes(tile_, plan.rank);
    tile_bytes_ = latent_bytes + math_.a_bytes(tile_, plan.rope);
    latent_bytes_ = latent_bytes;
    int64_t part = all * (plan.rank + 2) * 4;
    wave_ = static_cast<int>(std::clamp<int64_t>(kPartialBytes / part, 1, std::max(blocks_, 1)));
    int64_t sizes[] = {all * plan.rank * 4, all * plan.rope * 4, call.batch * tiles_ * tile_bytes_, wave_ * part,
                       all * 2 * 4};
    int64_t total = 0;
    for (int64_t& size : sizes) {
      size = aligned(size);
      total += size;
    }
    auto* at = static_cast<char*>(thread_scratch(1, static_cast<size_t>(total)));
    char* areas[5];
    for (int i = 0; i < 5; i++) {
      areas[i] = at;
      at += sizes[i];
    }
    queries_ = reinterpret_cast<float*>(areas[0]);
    query_pe_ = reinterpret_cast<float*>(areas[1]);
    packed_ = areas[2];
    partial_ = reinterpret_cast<float*>(areas[3]);
    maxima_ = reinterpret_cast<float*>(areas[4]);
    sums_ = maxima_ + all;
  }

  void operator()() {
    spans_ = key_spans(call_);
    embed();
    parallel_for(int64_t{call_.batch} * tiles_, [&](int64_t i) { pack_queries(i); });
    // The queries' place is taken by what their rows add up to.
    std::fill(maxima_, maxima_ + int64_t{call_.batch} * rows_, kMinusInfinity);
    std::fill(sums_, sums_ + int64_t{call_.batch} * rows_, 0.0f);
    for (int first = 0; first < blocks_; first += wave_) {
      int count = std::min(wave_, blocks_ - first);
      int wanted = (2 * pool_threads() + count * call_.batch - 1) / (count * call_.batch);
      int groups = std::clamp(wanted, 1, tiles_);
      parallel_for(int64_t{call_.batch} * count * groups, [&](int64_t task) {
        int b = static_cast<int>(task / (count * groups)), rest = static_cast<int>(task % (count * groups));
        int group = rest % groups;
        attend(b, first, rest / groups, tiles_ * group / groups, tiles_ * (group + 1) / groups);
      });
      int64_t all = int64_t{call_.batch} * rows_;
      parallel_ranges(all, grain_for(all, double(count) * plan_.rank, 20000), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          merge(i, count, first == 0);
        }
      });
    }
    unembed();
  }

 private:
  // Row h * length + l of a batch is query l of head h.
  void embed() {
    int m = call_.batch * call_.length;
    parallel_ranges(plan_.heads, grain_for(plan_.heads, double(plan_.rank) * plan_.nope, 20000),
                    [&](int64_t begin, int64_t end) {
                      std::vector<float> x(static_cast<size_t>(m) * plan_.nope);
                      for (int64_t h = begin; h < end; h++) {
                        float* out[kMaxRows];
                        for (int i = 0; i < m; i++) {
                          int b = i / call_.length, l = i % call_.length;
                          int64_t row = int64_t{b} * rows_ + h * call_.length + l;
                          call_.q_nope.fetch(b, h, l, plan_.nope, x.data() + int64_t{i} * plan_.nope);
                          out[i] = queries_ + row * plan_.rank;
                          if (plan_.rope > 0) {
                            float* pe = query_pe_ + row * plan_.rope;
                            call_.q_pe.fetch(b, h, l, plan_.rope, pe);
                            ops().scale_row(pe, plan_.scale, plan_.rope);
                          }
                        }
                        project_rows(plan_.embed[h], plan_.fast, x.data(), m, out);
                        for (int i = 0; i < m; i++) {
                          ops().scale_row(out[i], plan_.scale, plan_.rank);
                        }
                      }
                    });
  }

  int tile_rows(int tile) const {
    return std::min(tile_, rows_ - tile * tile_);
  }

  char* packed_queries(int b, int tile) const {
    return packed_ + (int64_t{b} * tiles_ + tile) * tile_bytes_;
  }

  void pack_queries(int64_t i) {
    int b = static_cast<int>(i / tiles_), tile = static_cast<int>(i % tiles_);
    int64_t row = int64_t{b} * rows_ + int64_t{tile} * tile_;
    char* to = packed_queries(b, tile);
    math_.pack_a(to, queries_ + row * plan_.rank, Float::f32, plan_.rank, 1, tile_rows(tile), plan_.rank);
    if (plan_.rope > 0) {
      math_.pack_a(to + latent_bytes_, query_pe_ + row * plan_.rope, Float::f32, plan_.rope, 1, tile_rows(tile), plan_.rope);
    }
  }

  // Weighted sums, maxima and sums of all rows for the block at `slot` of a wave.
  float* partial(int slot) const {
    return partial_ + int64_t{slot} * call_.batch * rows_ * (plan_.rank + 2);
  }

  // Rows of tiles [tile0, tile1) against block first + slot.
  void attend(int b, int first, int slot, int tile0, int tile1) {
    int key = (first + slot) * kBlockKeys, n = std::min(kBlockKeys, call_.keys - key);
    int64_t all = int64_t{call_.batch} * rows_;
    float *out = partial(slot), *maxima = out + all * plan_.rank, *sums = maxima + all;
    int64_t sizes[] = {aligned(math_.b_bytes(plan_.rank, n)), aligned(math_.b_bytes(plan_.rope, n)),
                       aligned(math_.b_bytes(n, plan_.rank)), aligned(int64_t{tile_} * kScoreStride * 4),
                       aligned(math_.a_bytes(tile_, n))};
    int64_t total = 0;
    for (int64_t size : sizes) {
      total += size;
    }
    auto* keys = static_cast<char*>(thread_scratch(0, static_cast<size_t>(total)));
    char *key_pe = keys + sizes[0], *values = key_pe + sizes[1];
    auto* scores = reinterpret_cast<float*>(values + sizes[2]);
    char* weights = reinterpret_cast<char*>(scores) + sizes[3];
    const LatentRows &c = call_.latent, &pe = call_.k_pe;
    // Values first: packing them reads the cache in order.
    math_.pack_b(values, c.at(b, 0, key), c.type, c.row, c.step, n, plan_.rank);
    math_.pack_b(keys, c.at(b, 0, key), c.type, c.step, c.row, plan_.rank, n);
    if (plan_.rope > 0) {
      math_.pack_b(key_pe, pe.at(b, 0, key), pe.type, pe.step, pe.row, plan_.rope, n);
    }
    for (int tile = tile0; tile < tile1; tile++) {
      int rows = tile_rows(tile);
      int64_t row = int64_t{b} * rows_ + int64_t{tile} * tile_;
      const char* queries = packed_queries(b, tile);
      LatentProduct products[] = {{queries, keys, plan_.rank}, {queries + latent_bytes_, key_pe, plan_.rope}};
      math_.gemm(scores, kScoreStride, products, 2, rows, n, false);
      for (int r = 0; r < rows; r++) {
        int l = (tile * tile_ + r) % call_.length;
        maxima[row + r] = kMinusInfinity;
        sums[row + r] = 0;
        weigh_keys(call_, spans_[b * call_.length + l], b, l, key, n, scores + int64_t{r} * kScoreStride, maxima + row + r,
                   sums + row + r);
      }
      math_.pack_a(weights, scores, Float::f32, kScoreStride, 1, rows, n);
      math_.multiply(out + row * plan_.rank, plan_.rank, {weights, values, n}, rows, plan_.rank, false);
    }
  }

  void merge(int64_t row, int count, bool first) {
    int64_t all = int64_t{call_.batch} * rows_;
    float* to = queries_ + row * plan_.rank;
    if (first) {
      std::fill(to, to + plan_.rank, 0.0f);
    }
    float &top = maxima_[row], &sum = sums_[row];
    for (int slot = 0; slot < count; slot++) {
      const float* from = partial(slot);
      float part_top = from[all * plan_.rank + row], part_sum = from[all * (plan_.rank + 1) + row];
      if (part_top == kMinusInfinity) {
        continue;
      }
      float best = std::max(top, part_top);
      float before = top == kMinusInfinity ? 0.0f : std::exp(top - best), after = std::exp(part_top - best);
      ops().blend_row(to, before, from + row * plan_.rank, after, plan_.rank);
      sum = sum * before + part_sum * after;
      top = best;
    }
  }

  void unembed() {
    int m = call_.batch * call_.length;
    parallel_ranges(plan_.heads, grain_for(plan_.heads, double(plan_.rank) * plan_.value, 20000),
                    [&](int64_t begin, int64_t end) {
                      std::vector<float> x(static_cast<size_t>(m) * plan_.rank);
                      for (int64_t h = begin; h < end; h++) {
                        float* out[kMaxRows];
                        for (int i = 0; i < m; i++) {
                          int64_t row = int64_t{i / call_.length} * rows_ + h * call_.length + i % call_.length;
                          float* to = x.data() + int64_t{i} * plan_.rank;
                          std::copy_n(queries_ + row * plan_.rank, plan_.rank, to);
                          ops().scale_row(to, 1.0f / sums_[row], plan_.rank);
                          out[i] = call_.out + (int64_t{i} * plan_.heads + h) * plan_.value;
                        }
                        project_rows(plan_.unembed[h], plan_.fast, x.data(), m, out);
                      }
                    });
  }

  const LatentPlan& plan_;
  const LatentCall& call_;
  const LatentMath& math_;
  int rows_, blocks_, tile_, tiles_, wave_ = 1;
  int64_t tile_bytes_ = 0, latent_bytes_ = 0;
  float *queries_, *query_pe_, *partial_, *maxima_, *sums_;
  char* packed_;
  std::vector<KeySpan> spans_;
};

} // namespace

void LatentRows::fetch(int64_t b, int64_t h, int64_t r, int n, float* to) const {
  const void* from = at(b, h, r);
  if (step == 1) {
    ops().to_f32(to, from, type, n);
    return;
  }
  for (int i = 0; i < n; i++) {
    ops().to_f32(to + i, offset(from, type, i * step), type, 1);
  }
}

std::vector<KeySpan> key_spans(const LatentCall& call) {
  std::vector<KeySpan> spans(static_cast<size_t>(call.batch) * call.length);
  for (int b = 0; b < call.batch; b++) {
    for (int l = 0; l < call.length; l++) {
      KeySpan& span = spans[static_cast<size_t>(b) * call.length + l];
      if (!call.keep) {
        span.last = call.causal ? call.keys - call.length + l : call.keys - 1;
        continue;
      }
      const bool* row = call.keep + b * call.mask_strides[0] + l * call.mask_strides[1];
      int kept = 0;
      for (int j = 0; j < call.keys; j++) {
        if (row[j * call.mask_strides[2]]) {
          span.first = kept++ == 0 ? j : span.first;
          span.last = j;
        }
      }
      span.blank = kept == 0;
      span.solid = kept == span.last - span.first + 1;
      if (span.blank) {
        span = {0, call.keys - 1, true, true};
      }
    }
  }
  return spans;
}

float weigh_keys(const LatentCall& call, const KeySpan& span, int b, int l, int key, int n, float* scores, float* maximum,
                 float* sum) {
  int begin = std::clamp(span.first - key, 0, n), end = std::clamp(span.last + 1 - key, 0, n);
  if (begin >= end) {
    std::fill(scores, scores + n, 0.0f);
    return 1;
  }
  std::fill(scores, scores + begin, -std::numeric_limits<float>::max());
  if (span.blank) {
    std::fill(scores, scores + end, 0.0f);
  } else if (!span.solid) {
    const bool* row = call.keep + b * call.mask_strides[0] + l * call.mask_strides[1] + key * call.mask_strides[2];
    for (int j = begin; j < end; j++) {
      scores[j] = row[j * call.mask_strides[2]] ? scores[j] : -std::numeric_limits<float>::max();
    }
  }
  float factor = ops().online_softmax(scores, end, maximum, sum);
  std::fill(scores + end, scores + n, 0.0f);
  return factor;
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
    for (int i = 0; i < m;) {
      // Rows that lie at one stride go together.
      int count = 1;
      int64_t stride = i + 1 < m ? out[i + 1] - out[i] : 0;
      while (i + count < m && out[i + count] - out[i + count - 1] == stride) {
        count++;
      }
      ops().dot_rows(out[i], stride, x + int64_t{i} * p.k, p.k, count, p.plain, p.plain_type, p.plain_stride, p.k, 0, p.n);
      i += count;
    }
  }
}

void run_latent_few(const LatentPlan& plan, const LatentCall& call) {
  // As many sequences at a time as the row kernels take.
  int together = kMaxRows / call.length;
  for (int b = 0; b < call.batch; b += together) {
    LatentCall part = call;
    part.batch = std::min(together, call.batch - b);
    for (LatentRows* rows : {&part.q_nope, &part.q_pe, &part.latent, &part.k_pe}) {
      rows->data = rows->at(b, 0, 0);
    }
    part.keep = call.keep ? call.keep + b * call.mask_strides[0] : nullptr;
    part.out = call.out + int64_t{b} * call.length * plan.heads * plan.value;
    FewRows run(plan, part);
    run();
  }
}

} // namespace edger1
