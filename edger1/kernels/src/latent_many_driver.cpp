// Latent attention over many rows. A piece of work is some rows of a few heads; it passes over the keys in blocks with an
// online softmax, so that nothing grows with heads times context.
//
// Either the rows are absorbed (rank + rope + rank products for a row, head and key), or keys and values are made from the
// latents block by block (nope + rope + value, and rank * (nope + value) for each key and head, which the rows share).
#include <algorithm>
#include <cstring>
#include <limits>

#include "latent_plan.h"
#include "pool.h"

namespace edger1 {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int kBlockKeys = 256;
constexpr int kScoreStride = kBlockKeys + 16;
constexpr int kMostRows = 512;     // of one head in a piece of work
constexpr int kMostHeads = 4;      // that share a packed block of latents, where each has many rows

// Hands out pieces of a buffer, each aligned to 64 bytes; without a buffer it counts.
class Areas {
 public:
  explicit Areas(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  void take(T*& area, int64_t bytes) {
    area = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += padded(bytes, 64);
  }
  int64_t used() const {
    return used_;
  }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Piece {
  int batch, head, heads, row, rows;
};

class Run {
 public:
  Run(const LatentPlan& plan, const LatentCall& call, const std::vector<KeySpan>& spans, bool expand, const Piece& piece)
      : plan_(plan), call_(call), math_(latent_math(plan.bf16)), spans_(spans), expand_(expand), piece_(piece),
        key_dim_(expand ? plan.nope : plan.rank), value_dim_(expand ? plan.value : plan.rank), tile_(math_.row_tile),
        tiles_((piece.rows + tile_ - 1) / tile_) {
    Areas count(nullptr);
    lay_out(count);
    Areas areas(thread_scratch(0, static_cast<size_t>(count.used())));
    lay_out(areas);
  }

  void operator()() {
    int begin = call_.keys, end = 0;
    for (int r = 0; r < piece_.rows; r++) {
      begin = std::min(begin, span(r).first);
      end = std::max(end, span(r).last + 1);
    }
    for (int h = 0; h < piece_.heads; h++) {
      prepare(h);
    }
    int64_t all = int64_t{piece_.heads} * piece_.rows;
    std::fill(maxima_, maxima_ + all, kMinusInfinity);
    std::fill(sums_, sums_ + all, 0.0f);
    std::fill(out_, out_ + all * value_dim_, 0.0f);
    for (int key = begin / kBlockKeys * kBlockKeys; key < end; key += kBlockKeys) {
      meet(key, std::min(kBlockKeys, call_.keys - key));
    }
    for (int h = 0; h < piece_.heads; h++) {
      finish(h);
    }
  }

 private:
  void lay_out(Areas& areas) {
    int64_t all = int64_t{piece_.heads} * piece_.rows, head_dim = std::max(plan_.nope, plan_.value);
    latent_bytes_ = padded(math_.a_bytes(tile_, key_dim_), 64);
    tile_bytes_ = latent_bytes_ + padded(math_.a_bytes(tile_, plan_.rope), 64);
    areas.take(queries_, piece_.heads * tiles_ * tile_bytes_);
    areas.take(out_, all * value_dim_ * 4);
    areas.take(maxima_, all * 4);
    areas.take(sums_, all * 4);
    areas.take(key_pe_, math_.b_bytes(plan_.rope, kBlockKeys));
    areas.take(keys_, math_.b_bytes(key_dim_, kBlockKeys));
    areas.take(values_, math_.b_bytes(kBlockKeys, value_dim_));
    areas.take(scores_, int64_t{tile_} * kScoreStride * 4);
    areas.take(weights_, math_.a_bytes(tile_, kBlockKeys));
    areas.take(wide_, plan_.rank * head_dim * 4);
    areas.take(unpacked_, call_.latent.format.packed() ? int64_t{kBlockKeys} * plan_.rank * 4 : 0);
    areas.take(rows_, int64_t{tile_} * std::max<int64_t>({plan_.rank, head_dim, plan_.rope}) * 4);
    if (expand_) {
      embed_bytes_ = padded(math_.b_bytes(plan_.rank, plan_.nope), 64);
      matrix_bytes_ = embed_bytes_ + padded(math_.b_bytes(plan_.rank, plan_.value), 64);
      areas.take(matrices_, piece_.heads * matrix_bytes_);
      areas.take(latents_, math_.a_bytes(kBlockKeys, plan_.rank));
      areas.take(expanded_, kBlockKeys * head_dim * 4);
    } else {
      areas.take(matrices_, std::max(math_.b_bytes(plan_.nope, plan_.rank), math_.b_bytes(plan_.rank, plan_.value)));
      areas.take(packed_, math_.a_bytes(tile_, static_cast<int>(std::max<int64_t>(plan_.rank, plan_.nope))));
      areas.take(absorbed_, int64_t{tile_} * std::max(plan_.rank, plan_.value) * 4);
    }
  }

  const KeySpan& span(int r) const {
    return spans_[static_cast<size_t>(piece_.batch) * call_.length + piece_.row + r];
  }
  char* queries(int h, int tile) const {
    return queries_ + (int64_t{h} * tiles_ + tile) * tile_bytes_;
  }
  int tile_rows(int tile) const {
    return std::min(tile_, piece_.rows - tile * tile_);
  }

  // Scaled queries of a tile as contiguous rows.
  void fetch(const LatentRows& from, int h, int tile, int dim) {
    for (int r = 0; r < tile_rows(tile); r++) {
      float* row = rows_ + int64_t{r} * dim;
      from.fetch(piece_.batch, piece_.head + h, piece_.row + tile * tile_ + r, dim, row);
      ops().scale_row(row, plan_.scale, dim);
    }
  }

  // Packs the queries of a head, and the matrices that its keys and values are made with.
  void prepare(int h) {
    const LatentMath& math = math_;
    int rank = plan_.rank, nope = plan_.nope;
    bool by_rows = plan_.embed_by_rows;
    widen(plan_.embed[piece_.head + h], wide_);
    if (expand_) {
      char* to = matrices_ + h * matrix_bytes_;
      math.pack_b(to, wide_, Float::f32, by_rows ? 1 : nope, by_rows ? rank : 1, rank, nope);
      widen(plan_.unembed[piece_.head + h], wide_);
      math.pack_b(to + embed_bytes_, wide_, Float::f32, 1, rank, rank, plan_.value);
    } else {
      math.pack_b(matrices_, wide_, Float::f32, by_rows ? rank : 1, by_rows ? 1 : nope, nope, rank);
    }
    for (int tile = 0; tile < tiles_; tile++) {
      int rows = tile_rows(tile);
      fetch(call_.q_nope, h, tile, nope);
      if (expand_) {
        math.pack_a(queries(h, tile), rows_, Float::f32, nope, 1, rows, nope);
      } else {
        math.pack_a(packed_, rows_, Float::f32, nope, 1, rows, nope);
        math.multiply(absorbed_, rank, {packed_, matrices_, nope}, rows, rank, false);
        math.pack_a(queries(h, tile), absorbed_, Float::f32, rank, 1, rows, rank);
      }
      if (plan_.rope > 0) {
        fetch(call_.q_pe, h, tile, plan_.rope);
        math.pack_a(queries(h, tile) + latent_bytes_, rows_, Float::f32, plan_.rope, 1, rows, plan_.rope);
      }
    }
  }

  // All rows of all heads against a block of keys.
  void meet(int key, int n) {
    const LatentRows c = call_.latent.block(piece_.batch, key, n, plan_.rank, unpacked_), &pe = call_.k_pe;
    const void* latents = c.data;
    if (plan_.rope > 0) {
      math_.pack_b(key_pe_, pe.at(piece_.batch, 0, key), pe.type, pe.step, pe.row, plan_.rope, n);
    }
    if (!expand_) {
      // Values first: packing them reads the cache in order.
      math_.pack_b(values_, latents, c.type, c.row, c.step, n, plan_.rank);
      math_.pack_b(keys_, latents, c.type, c.step, c.row, plan_.rank, n);
      for (int h = 0; h < piece_.heads; h++) {
        attend(h, key, n);
      }
      return;
    }
    math_.pack_a(latents_, latents, c.type, c.row, c.step, n, plan_.rank);
    for (int h = 0; h < piece_.heads; h++) {
      const char* matrices = matrices_ + h * matrix_bytes_;
      math_.multiply(expanded_, plan_.nope, {latents_, matrices, plan_.rank}, n, plan_.nope, false);
      math_.pack_b(keys_, expanded_, Float::f32, 1, plan_.nope, plan_.nope, n);
      math_.multiply(expanded_, plan_.value, {latents_, matrices + embed_bytes_, plan_.rank}, n, plan_.value, false);
      math_.pack_b(values_, expanded_, Float::f32, plan_.value, 1, n, plan_.value);
      attend(h, key, n);
    }
  }

  void attend(int h, int key, int n) {
    for (int tile = 0; tile < tiles_; tile++) {
      int rows = tile_rows(tile), first = tile * tile_;
      bool any = false;
      for (int r = first; r < first + rows; r++) {
        any |= span(r).first < key + n && span(r).last >= key;
      }
      if (!any) {
        continue;
      }
      int64_t at = int64_t{h} * piece_.rows + first;
      const char* q = queries(h, tile);
      LatentProduct products[] = {{q, keys_, key_dim_}, {q + latent_bytes_, key_pe_, plan_.rope}};
      math_.gemm(scores_, kScoreStride, products, 2, rows, n, false);
      for (int r = 0; r < rows; r++) {
        float factor = weigh_keys(call_, span(first + r), piece_.batch, piece_.row + first + r, key, n,
                                  scores_ + int64_t{r} * kScoreStride, maxima_ + at + r, sums_ + at + r);
        if (factor != 1) {
          ops().scale_row(out_ + (at + r) * value_dim_, factor, value_dim_);
        }
      }
      math_.pack_a(weights_, scores_, Float::f32, kScoreStride, 1, rows, n);
      math_.multiply(out_ + at * value_dim_, value_dim_, {weights_, values_, n}, rows, value_dim_, true);
    }
  }

  float* result(int h, int r) const {
    int64_t row = int64_t{piece_.batch} * call_.length + piece_.row + r;
    return call_.out + (row * plan_.heads + piece_.head + h) * plan_.value;
  }

  void finish(int h) {
    int64_t at = int64_t{h} * piece_.rows;
    for (int r = 0; r < piece_.rows; r++) {
      ops().scale_row(out_ + (at + r) * value_dim_, 1.0f / sums_[at + r], value_dim_);
    }
    if (expand_) {
      for (int r = 0; r < piece_.rows; r++) {
        std::copy_n(out_ + (at + r) * value_dim_, plan_.value, result(h, r));
      }
      return;
    }
    widen(plan_.unembed[piece_.head + h], wide_);
    math_.pack_b(matrices_, wide_, Float::f32, 1, plan_.rank, plan_.rank, plan_.value);
    for (int tile = 0; tile < tiles_; tile++) {
      int rows = tile_rows(tile);
      math_.pack_a(packed_, out_ + (at + tile * tile_) * plan_.rank, Float::f32, plan_.rank, 1, rows, plan_.rank);
      math_.multiply(absorbed_, plan_.value, {packed_, matrices_, plan_.rank}, rows, plan_.value, false);
      for (int r = 0; r < rows; r++) {
        std::copy_n(absorbed_ + int64_t{r} * plan_.value, plan_.value, result(h, tile * tile_ + r));
      }
    }
  }

  const LatentPlan& plan_;
  const LatentCall& call_;
  const LatentMath& math_;
  const std::vector<KeySpan>& spans_;
  bool expand_;
  Piece piece_;
  int key_dim_, value_dim_, tile_, tiles_;
  int64_t latent_bytes_ = 0, tile_bytes_ = 0, embed_bytes_ = 0, matrix_bytes_ = 0;
  char *queries_ = nullptr, *key_pe_ = nullptr, *keys_ = nullptr, *values_ = nullptr, *weights_ = nullptr;
  char *matrices_ = nullptr, *latents_ = nullptr, *packed_ = nullptr;
  float *out_ = nullptr, *maxima_ = nullptr, *sums_ = nullptr, *scores_ = nullptr, *wide_ = nullptr, *rows_ = nullptr;
  float *expanded_ = nullptr, *absorbed_ = nullptr, *unpacked_ = nullptr;
};

} // namespace

void run_latent_many(const LatentPlan& plan, const LatentCall& call) {
  auto spans = key_spans(call);
  int rows = std::min(call.length, kMostRows);
  int row_pieces = (call.length + rows - 1) / rows;
  rows = (call.length + row_pieces - 1) / row_pieces;
  int64_t saved = 2 * int64_t{plan.rank} - plan.nope - plan.value;
  bool expand = rows * saved > int64_t{plan.rank} * (plan.nope + plan.value);
  // Enough pieces for all threads to end together.
  int64_t fewest = 8 * int64_t{pool_threads()};
  int64_t most = std::max(kMostHeads, kMostRows / rows);
  int heads = static_cast<int>(std::clamp<int64_t>(int64_t{plan.heads} * call.batch * row_pieces / fewest, 1, most));
  int head_pieces = (plan.heads + heads - 1) / heads;
  parallel_for(int64_t{call.batch} * row_pieces * head_pieces, [&](int64_t i) {
    // The last rows see the most keys: they go first.
    int head = static_cast<int>(i % head_pieces) * heads, rest = static_cast<int>(i / head_pieces);
    int row = (row_pieces - 1 - rest % row_pieces) * rows, batch = rest / row_pieces;
    Piece piece{batch, head, std::min(heads, plan.heads - head), row, std::min(rows, call.length - row)};
    if (piece.rows > 0) {
      Run run(plan, call, spans, expand, piece);
      run();
    }
  });
}

} // namespace edger1
