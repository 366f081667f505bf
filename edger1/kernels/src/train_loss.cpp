// Cross entropy over a vocabulary with its gradients, a block of rows at a time.
#include <cmath>

#include "train_common.h"
#include "train_ops.h"

namespace edger1 {
namespace {

constexpr int64_t kSuperRows = 2048; // rows whose logits' gradients exist at once
constexpr int64_t kBlockRows = 64;

struct Job {
  int64_t rows, dim, vocabulary;
  const float *x, *head, *weights;
  const int32_t* targets;
  float *loss, *d_x, *d_head;
};

void run_cross_entropy(const GemmEngine& g, const Job& job) {
  int dim = static_cast<int>(job.dim), vocabulary = static_cast<int>(job.vocabulary);
  int64_t super = std::min(job.rows, kSuperRows), stored = bytes_of(g.stored);
  for (int64_t i = 0; i < job.rows; i++) {
    if (job.targets[i] < 0 || job.targets[i] >= vocabulary) {
      throw std::invalid_argument("cross_entropy: a target lies beyond the vocabulary");
    }
  }
  Carver whole;
  size_t across_at = whole.reserve(g.b_bytes(job.dim, job.vocabulary)), along_at = whole.reserve(g.b_bytes(job.vocabulary, job.dim));
  size_t x_at = whole.reserve(g.b_bytes(super, job.dim)), d_at = whole.reserve(static_cast<size_t>(super * job.vocabulary * stored));
  size_t losses_at = whole.reserve(sizeof(float) * static_cast<size_t>(job.rows));
  auto* base = static_cast<char*>(thread_scratch(1, whole.total()));
  char *across = base + across_at, *along = base + along_at, *packed_x = base + x_at, *d_logits = base + d_at;
  auto* losses = reinterpret_cast<float*>(base + losses_at);
  Matrix head = rows_of(job.head, job.dim);
  // Pieces of the vocabulary, whole panels each.
  int64_t piece = std::max<int64_t>(engine_piece(g, 128), 1), pieces = (job.vocabulary + piece - 1) / piece;
  parallel_for(pieces, [&](int64_t i) {
    int64_t v0 = i * piece, count = std::min(piece, job.vocabulary - v0);
    g.pack_b(across + g.b_bytes(job.dim, v0), transposed(rows_of(job.head + v0 * job.dim, job.dim)), dim,
             static_cast<int>(count));
  });
  int64_t panels = (job.dim + g.columns - 1) / g.columns;
  parallel_for(panels, [&](int64_t i) {
    int64_t j0 = i * g.columns;
    g.pack_b(along + g.b_bytes(job.vocabulary, j0), head.at(j0), vocabulary,
             static_cast<int>(std::min<int64_t>(g.columns, job.dim - j0)));
  });
  for (int64_t row = 0; row < job.rows; row += super) {
    int64_t count = std::min(super, job.rows - row);
    parallel_for((count + kBlockRows - 1) / kBlockRows, [&](int64_t block) {
      int64_t r0 = block * kBlockRows;
      int rows = static_cast<int>(std::min(kBlockRows, count - r0));
      Carver own;
      size_t logits_at = own.reserve(sizeof(float) * static_cast<size_t>(kBlockRows * job.vocabulary));
      size_t a_at = own.reserve(g.a_bytes(kBlockRows, std::max(job.dim, job.vocabulary)));
      auto* scratch = static_cast<char*>(thread_scratch(0, own.total()));
      auto* logits = reinterpret_cast<float*>(scratch + logits_at);
      void* a = scratch + a_at;
      g.pack_a(a, rows_of(job.x + (row + r0) * job.dim, job.dim), rows, dim);
      g.gemm(logits, job.vocabulary, a, across, rows, vocabulary, dim, false);
      for (int r = 0; r < rows; r++) {
        int64_t at = row + r0 + r;
        float* own_logits = logits + r * job.vocabulary;
        float weight = job.weights[at], *target = own_logits + job.targets[at];
        float picked = *target, total = ops().log_sum_exp(own_logits, vocabulary);
        losses[at] = weight == 0 ? 0 : weight * (total - picked);
        ops().softmax(own_logits, own_logits, vocabulary);
        *target -= 1;
        ops().scale_row(own_logits, weight, vocabulary);
        ops().from_f32(d_logits + (r0 + r) * job.vocabulary * stored, g.stored, own_logits, job.vocabulary);
      }
      // Packed from the rounded rows or from these comes to the same.
      g.pack_a(a, rows_of(logits, job.vocabulary), rows, vocabulary);
      g.gemm(job.d_x + (row + r0) * job.dim, job.dim, a, along, rows, dim, vocabulary, false);
    });
    parallel_for(panels, [&](int64_t i) {
      int64_t j0 = i * g.columns;
      g.pack_b(packed_x + g.b_bytes(count, j0), rows_of(job.x + row * job.dim, job.dim).at(j0), static_cast<int>(count),
               static_cast<int>(std::min<int64_t>(g.columns, job.dim - j0)));
    });
    parallel_for((job.vocabulary + kBlockRows - 1) / kBlockRows, [&](int64_t block) {
      int64_t v0 = block * kBlockRows;
      int height = static_cast<int>(std::min(kBlockRows, job.vocabulary - v0));
      void* a = thread_scratch(0, g.a_bytes(kBlockRows, count));
      g.pack_a(a, Matrix{d_logits + v0 * stored, g.stored, 1, job.vocabulary}, height, static_cast<int>(count));
      g.gemm(job.d_head + v0 * job.dim, job.dim, a, packed_x, height, dim, static_cast<int>(count), row > 0);
    });
  }
  double sum = 0;
  for (int64_t i = 0; i < job.rows; i++) {
    sum += static_cast<double>(losses[i]);
  }
  *job.loss = static_cast<float>(sum);
}

class CrossEntropy : public TrainPrimitive {
 public:
  CrossEntropy(mx::Stream s, bool mixed) : TrainPrimitive(s), mixed_(mixed) {}
  const char* name() const override {
    return "EdgeR1CrossEntropy";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    for (auto& one : out) {
      allocate(one);
    }
    Job job{in[0].shape(0),        in[0].shape(1),         in[1].shape(0),         in[0].data<float>(),  in[1].data<float>(),
            in[3].data<float>(),   in[2].data<int32_t>(),  out[0].data<float>(),   out[1].data<float>(), out[2].data<float>()};
    launch(stream(), [job, &g = gemm_engine(mixed_)] { run_cross_entropy(g, job); });
  }

 private:
  bool mixed_;
};

} // namespace

std::vector<mx::array> cross_entropy(const mx::array& x, const mx::array& head, const mx::array& targets,
                                     const mx::array& weights, bool mixed) {
  mx::Stream stream = train_stream("cross_entropy");
  std::vector<mx::array> in{plain_input(x, 2, "cross_entropy: x"), plain_input(head, 2, "cross_entropy: head"),
                            plain_input(targets, 1, "cross_entropy: targets", mx::int32),
                            plain_input(weights, 1, "cross_entropy: weights")};
  require(x.shape(1) == head.shape(1) && x.shape(0) == targets.shape(0) && targets.shape() == weights.shape() &&
              x.size() > 0 && head.size() > 0,
          "cross_entropy: expected x [T, D], head [V, D], targets and weights [T]");
  return mx::array::make_arrays({{}, x.shape(), head.shape()}, std::vector<mx::Dtype>(3, mx::float32),
                                std::make_shared<CrossEntropy>(stream, mixed), in);
}

} // namespace edger1
