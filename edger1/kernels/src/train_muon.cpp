// Newton-Schulz steps of Muon, matrix by matrix in the cache, all matrices of a model side by side.
#include <cmath>

#include "train_common.h"
#include "train_ops.h"
#include "update_table.h"

namespace edger1 {
namespace {

// Quintic of Newton-Schulz and its number of steps, from Jordan's Muon.
constexpr float kA = 3.4445f, kB = -4.7750f, kC = 2.0315f;
constexpr int kSteps = 5;

struct Job {
  const float* from;
  float* to;
  int64_t rows, columns;
};

// c (m x n) = a b with a's operands in memory of the caller's; k is small enough to be packed whole.
void product(const GemmEngine& g, float* c, const Matrix& a, const Matrix& b, int64_t m, int64_t n, int64_t k, char* packed_a,
             char* packed_b) {
  g.pack_a(packed_a, a, static_cast<int>(m), static_cast<int>(k));
  g.pack_b(packed_b, b, static_cast<int>(k), static_cast<int>(n));
  g.gemm(c, n, packed_a, packed_b, static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), false);
}

void orthogonalize(const GemmEngine& g, const Job& job) {
  // Rows are the shorter side.
  bool tall = job.rows > job.columns;
  int64_t m = std::min(job.rows, job.columns), n = std::max(job.rows, job.columns), size = m * n;
  Carver own;
  size_t at[] = {sizeof(float) * static_cast<size_t>(size), sizeof(float) * static_cast<size_t>(size),
                 sizeof(float) * static_cast<size_t>(m * m), sizeof(float) * static_cast<size_t>(m * m),
                 g.a_bytes(m, n), std::max(g.b_bytes(n, m), g.b_bytes(m, n))};
  for (size_t& one : at) {
    one = own.reserve(one);
  }
  auto* scratch = static_cast<char*>(thread_scratch(0, own.total()));
  float* part[4];
  for (int i = 0; i < 4; i++) {
    part[i] = reinterpret_cast<float*>(scratch + at[i]);
  }
  auto [x, y, a, b] = part;
  char *packed_a = scratch + at[4], *packed_b = scratch + at[5];
  auto norm = static_cast<float>(1 / (std::sqrt(update_table().squares(job.from, size)) + 1e-7));
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = 0; j < n; j++) {
      x[i * n + j] = norm * (tall ? job.from[j * m + i] : job.from[i * n + j]);
    }
  }
  for (int step = 0; step < kSteps; step++) {
    product(g, a, rows_of(x, n), transposed(rows_of(x, n)), m, m, n, packed_a, packed_b);
    product(g, b, rows_of(a, m), rows_of(a, m), m, m, m, packed_a, packed_b);
    update_table().blend(b, a, kB, b, kC, m * m);
    product(g, y, rows_of(b, m), rows_of(x, n), m, n, m, packed_a, packed_b);
    update_table().blend(x, x, kA, y, 1, size);
  }
  for (int64_t i = 0; i < m; i++) {
    if (!tall) {
      std::memcpy(job.to + i * n, x + i * n, sizeof(float) * static_cast<size_t>(n));
      continue;
    }
    for (int64_t j = 0; j < n; j++) {
      job.to[j * m + i] = x[i * n + j];
    }
  }
}

class Orthogonal : public TrainPrimitive {
 public:
  Orthogonal(mx::Stream s, bool mixed) : TrainPrimitive(s), mixed_(mixed) {}
  const char* name() const override {
    return "EdgeR1Orthogonal";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    std::vector<Job> jobs;
    for (size_t i = 0; i < in.size(); i++) {
      allocate(out[i]);
      int64_t rows = in[i].shape(-2), columns = in[i].shape(-1), size = rows * columns;
      for (int64_t at = 0; at < static_cast<int64_t>(in[i].size()); at += size) {
        jobs.push_back({in[i].data<float>() + at, out[i].data<float>() + at, rows, columns});
      }
    }
    // The largest go first, so that no thread is left alone with one.
    std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.rows * a.columns > b.rows * b.columns; });
    launch(stream(), [jobs = std::move(jobs), &g = gemm_engine(mixed_)] {
      parallel_for(static_cast<int64_t>(jobs.size()), [&](int64_t i) { orthogonalize(g, jobs[static_cast<size_t>(i)]); });
    });
  }

 private:
  bool mixed_;
};

} // namespace

std::vector<mx::array> orthogonal(const std::vector<mx::array>& matrices, bool mixed) {
  mx::Stream stream = train_stream("orthogonal");
  require(!matrices.empty(), "orthogonal: expected matrices");
  std::vector<mx::array> in;
  std::vector<mx::Shape> shapes;
  for (const auto& one : matrices) {
    require(one.ndim() >= 2 && one.size() > 0, "orthogonal: expected matrices, or stacks of them");
    in.push_back(plain_input(one, static_cast<int>(one.ndim()), "orthogonal: a matrix"));
    shapes.push_back(one.shape());
  }
  std::vector<mx::Dtype> dtypes(shapes.size(), mx::float32);
  return mx::array::make_arrays(shapes, dtypes, std::make_shared<Orthogonal>(stream, mixed), in);
}

} // namespace edger1
