#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "latent_plan.h"
#include "pool.h"

namespace edger1 {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int kBlockKeys = 256;                  // these two are fixed, so that a row's result does not depend on how work is split
constexpr int kSpanBlocks = 2;
constexpr int kScoreStride = kBlockKeys + 16;    // rows a power of two apart would share few lines of the cache
constexpr int64_t kHotBytes = 768 << 10;         // of results, which stay in the second-level cache beside a packed block
constexpr int64_t kWaveBytes = 4 << 20;          // for a thread, of results that wait to be merged, and packed latents

int64_t aligned(int64_t bytes) {
  return padded(bytes, 64);
}

// All heads of few rows. Blocks of the cache are packed once for all rows that meet them. A piece of work is a span of some
// blocks, with an online softmax; the spans' results are merged in their order, some spans at a time. Where there are not
// enough spans for all threads, or the results of all rows do not stay in the cache from one block to the next, the blocks
// of a wave are packed first, and a piece is some of the rows against a span.
class FewRows {
 public:
  FewRows(const LatentPlan& plan, const LatentCall& call)
      : plan_(plan), call_(call), math_(latent_math(plan.bf16)), rows_(plan.heads * call.length),
        blocks_((call.keys + kBlockKeys - 1) / kBlockKeys) {
    int64_t all = int64_t{call.batch} * rows_;
    key_bytes_ = aligned(math_.b_bytes(plan.rank, kBlockKeys));
    key_pe_bytes_ = aligned(math_.b_bytes(plan.rope, kBlockKeys));
    block_bytes_ = key_bytes_ + key_pe_bytes_ + aligned(math_.b_bytes(kBlockKeys, plan.rank));
    int64_t part = aligned(all * (plan.rank + 2) * 4), packed = int64_t{call.batch} * kSpanBlocks * block_bytes_;
    int64_t spans = (blocks_ + kSpanBlocks - 1) / kSpanBlocks, most = kWaveBytes * pool_threads();
    whole_spans_ = part / call.batch <= kHotBytes &&
        std::min(most / part, spans) * call.batch >= 2 * int64_t{pool_threads()};
    wave_ = static_cast<int>(std::clamp<int64_t>(most / (whole_spans_ ? part : part + packed), 1, spans));
    tile_ = rows_of_a_piece();
    tiles_ = (rows_ + tile_ - 1) / tile_;
    latent_bytes_ = aligned(math_.a_bytes(tile_, plan.rank));
    tile_bytes_ = latent_bytes_ + aligned(math_.a_bytes(tile_, plan.rope));
    int64_t sizes[] = {all * plan.rank * 4, all * plan.rope * 4, call.batch * tiles_ * tile_bytes_,
                       whole_spans_ ? 0 : wave_ * packed, wave_ * part, all * 2 * 4};
    int64_t total = 0;
    for (int64_t& size : sizes) {
      size = aligned(size);
      total += size;
    }
    auto* at = static_cast<char*>(thread_scratch(1, static_cast<size_t>(total)));
    char* areas[6];
    for (int i = 0; i < 6; i++) {
      areas[i] = at;
      at += sizes[i];
    }
    queries_ = reinterpret_cast<float*>(areas[0]);
    query_pe_ = reinterpret_cast<float*>(areas[1]);
    packed_ = areas[2];
    latents_ = areas[3];
    partial_ = reinterpret_cast<float*>(areas[4]);
    partial_stride_ = part / 4;
    maxima_ = reinterpret_cast<float*>(areas[5]);
    sums_ = maxima_ + all;
  }

  void operator()() {
    spans_ = key_spans(call_);
    embed();
    parallel_for(int64_t{call_.batch} * tiles_, [&](int64_t i) { pack_queries(i); });
    // The queries' place is taken by what their rows add up to.
    std::fill(maxima_, maxima_ + int64_t{call_.batch} * rows_, kMinusInfinity);
    std::fill(sums_, sums_ + int64_t{call_.batch} * rows_, 0.0f);
    for (int first = 0; first < blocks_; first += wave_ * kSpanBlocks) {
      int blocks = std::min(wave_ * kSpanBlocks, blocks_ - first), spans = (blocks + kSpanBlocks - 1) / kSpanBlocks;
      // The last span, which may be a short one, is the last to be begun.
      if (whole_spans_) {
        parallel_for(int64_t{spans} * call_.batch, [&](int64_t i) {
          int b = static_cast<int>(i % call_.batch), span = static_cast<int>(i / call_.batch), at = span * kSpanBlocks;
          for (int j = 0; j < std::min(kSpanBlocks, blocks - at); j++) {
            char* packed = scratch() + tile_scratch_bytes();
            pack_block(b, first + at + j, packed);
            for (int tile = 0; tile < tiles_; tile++) {
              attend(b, tile, span, first + at + j, j == 0, packed);
            }
          }
        });
      } else {
        parallel_for(int64_t{call_.batch} * blocks, [&](int64_t i) {
          pack_block(static_cast<int>(i / blocks), first + static_cast<int>(i % blocks), latents_ + i * block_bytes_);
        });
        parallel_for(int64_t{spans} * call_.batch * tiles_, [&](int64_t i) {
          int tile = static_cast<int>(i % tiles_), rest = static_cast<int>(i / tiles_);
          int b = rest % call_.batch, span = rest / call_.batch, at = span * kSpanBlocks;
          for (int j = 0; j < std::min(kSpanBlocks, blocks - at); j++) {
            attend(b, tile, span, first + at + j, j == 0, latents_ + (int64_t{b} * blocks + at + j) * block_bytes_);
          }
        });
      }
      int64_t all = int64_t{call_.batch} * rows_;
      parallel_ranges(all, grain_for(all, double(spans) * plan_.rank, 20000), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          merge(i, spans, first == 0);
        }
      });
    }
    unembed();
  }

 private:
  // As many as go together best, fewer where some threads would have nothing to do.
  int rows_of_a_piece() const {
    int64_t wanted = whole_spans_ ? 1 : std::max<int64_t>(2 * pool_threads() / (int64_t{wave_} * call_.batch), 1);
    return static_cast<int>(std::clamp<int64_t>(padded(rows_ / wanted, math_.row_step), math_.row_step, math_.row_tile));
  }

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
                        if (plan_.embed_by_rows) {
                          project_back(plan_.embed[h], x.data(), m, out);
                        } else {
                          project_rows(plan_.embed[h], plan_.fast, x.data(), m, out);
                        }
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

  // Memory of a piece of work: for scores, weights and a packed block.
  char* scratch() const {
    return static_cast<char*>(thread_scratch(0, static_cast<size_t>(tile_scratch_bytes() + block_bytes_ + unpacked_bytes())));
  }
  // Of a block whose rows are packed.
  int64_t unpacked_bytes() const {
    return call_.latent.format.packed() ? aligned(int64_t{kBlockKeys} * plan_.rank * 4) : 0;
  }
  int64_t tile_scratch_bytes() const {
    return aligned(int64_t{tile_} * kScoreStride * 4) + aligned(math_.a_bytes(tile_, kBlockKeys));
  }

  void pack_block(int b, int block, char* to) {
    int key = block * kBlockKeys, n = std::min(kBlockKeys, call_.keys - key);
    auto* unpacked = reinterpret_cast<float*>(scratch() + tile_scratch_bytes() + block_bytes_);
    const LatentRows c = call_.latent.block(b, key, n, plan_.rank, unpacked), &pe = call_.k_pe;
    // Values first: packing them reads the cache in order.
    math_.pack_b(to + key_bytes_ + key_pe_bytes_, c.data, c.type, c.row, c.step, n, plan_.rank);
    math_.pack_b(to, c.data, c.type, c.step, c.row, plan_.rank, n);
    if (plan_.rope > 0) {
      math_.pack_b(to + key_bytes_, pe.at(b, 0, key), pe.type, pe.step, pe.row, plan_.rope, n);
    }
  }

  // Weighted sums, maxima and sums of all rows for a span of a wave.
  float* partial(int span) const {
    return partial_ + span * partial_stride_;
  }

  // The rows of a tile against a block, which may be the first of its span in a wave.
  void attend(int b, int tile, int span, int block, bool begins, const char* packed) {
    int64_t all = int64_t{call_.batch} * rows_, row = int64_t{b} * rows_ + int64_t{tile} * tile_;
    float *out = partial(span) + row * plan_.rank, *maxima = partial(span) + all * plan_.rank + row, *sums = maxima + all;
    char* weights = scratch();
    auto* scores = reinterpret_cast<float*>(weights + aligned(math_.a_bytes(tile_, kBlockKeys)));
    int rows = tile_rows(tile), key = block * kBlockKeys, n = std::min(kBlockKeys, call_.keys - key);
    if (begins) {
      std::fill(maxima, maxima + rows, kMinusInfinity);
      std::fill(sums, sums + rows, 0.0f);
    }
    const char* queries = packed_queries(b, tile);
    LatentProduct products[] = {{queries, packed, plan_.rank}, {queries + latent_bytes_, packed + key_bytes_, plan_.rope}};
    math_.gemm(scores, kScoreStride, products, 2, rows, n, false);
    for (int r = 0; r < rows; r++) {
      int l = (tile * tile_ + r) % call_.length;
      float factor = weigh_keys(call_, spans_[b * call_.length + l], b, l, key, n, scores + int64_t{r} * kScoreStride,
                                maxima + r, sums + r);
      if (!begins && factor != 1) {
        ops().scale_row(out + int64_t{r} * plan_.rank, factor, plan_.rank);
      }
    }
    math_.pack_a(weights, scores, Float::f32, kScoreStride, 1, rows, n);
    math_.multiply(out, plan_.rank, {weights, packed + key_bytes_ + key_pe_bytes_, n}, rows, plan_.rank, !begins);
  }

  void merge(int64_t row, int spans, bool first) {
    int64_t all = int64_t{call_.batch} * rows_;
    float* to = queries_ + row * plan_.rank;
    if (first) {
      std::fill(to, to + plan_.rank, 0.0f);
    }
    float &top = maxima_[row], &sum = sums_[row];
    for (int span = 0; span < spans; span++) {
      const float* from = partial(span);
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
  int rows_, blocks_, tile_ = 1, tiles_ = 1, wave_ = 1;
  bool whole_spans_ = false;
  int64_t tile_bytes_ = 0, latent_bytes_ = 0, key_bytes_ = 0, key_pe_bytes_ = 0, block_bytes_ = 0, partial_stride_ = 0;
  float *queries_, *query_pe_, *partial_, *maxima_, *sums_;
  char *packed_, *latents_;
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
