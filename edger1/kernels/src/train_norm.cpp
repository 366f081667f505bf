// A residual and the norm after it as one pass, forwards and backwards, and a router's choice.
#include "train_common.h"
#include "train_ops.h"

namespace edger1 {
namespace {

constexpr int64_t kRows = 256; // fixed, so that a weight's gradient does not depend on the threads

class AddNorm : public TrainPrimitive {
 public:
  AddNorm(mx::Stream s, float eps) : TrainPrimitive(s), eps_(eps) {}
  const char* name() const override {
    return "EdgeR1AddNorm";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    allocate(out[1]);
    int64_t n = in[0].shape(-1), rows = static_cast<int64_t>(in[0].size()) / n;
    launch(stream(), [=, eps = eps_, x = in[0].data<float>(), y = in[1].data<float>(), w = in[2].data<float>(),
                      sum = out[0].data<float>(), normed = out[1].data<float>()] {
      parallel_ranges(rows, kRows, [&](int64_t r, int64_t end) {
        for (; r < end; r++) {
          float* to = sum + r * n;
          std::memcpy(to, x + r * n, sizeof(float) * static_cast<size_t>(n));
          ops().blend_row(to, 1, y + r * n, 1, static_cast<int>(n));
          ops().rms_norm(normed + r * n, to, w, static_cast<int>(n), eps);
        }
      });
    });
  }

 private:
  float eps_;
};

class AddNormVjp : public TrainPrimitive {
 public:
  AddNormVjp(mx::Stream s, float eps) : TrainPrimitive(s), eps_(eps) {}
  const char* name() const override {
    return "EdgeR1AddNormVjp";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    allocate(out[1]);
    int64_t n = in[0].shape(-1), rows = static_cast<int64_t>(in[0].size()) / n;
    launch(stream(), [=, eps = eps_, x = in[0].data<float>(), w = in[1].data<float>(), d_sum = in[2].data<float>(),
                      d_normed = in[3].data<float>(), d_x = out[0].data<float>(), d_w = out[1].data<float>()] {
      std::vector<float> parts(static_cast<size_t>((rows + kRows - 1) / kRows * n));
      parallel_ranges(rows, kRows, [&](int64_t r, int64_t end) {
        float* part = parts.data() + r / kRows * n;
        for (; r < end; r++) {
          ops().rms_norm_vjp(d_x + r * n, part, x + r * n, w, d_normed + r * n, static_cast<int>(n), eps);
          ops().blend_row(d_x + r * n, 1, d_sum + r * n, 1, static_cast<int>(n));
        }
      });
      std::memset(d_w, 0, sizeof(float) * static_cast<size_t>(n));
      for (size_t i = 0; i < parts.size(); i += static_cast<size_t>(n)) {
        ops().blend_row(d_w, 1, parts.data() + i, 1, static_cast<int>(n));
      }
    });
  }

 private:
  float eps_;
};

class BestExperts : public TrainPrimitive {
 public:
  BestExperts(mx::Stream s, int64_t chosen) : TrainPrimitive(s), chosen_(chosen) {}
  const char* name() const override {
    return "EdgeR1BestExperts";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    int64_t n = in[0].shape(-1), rows = static_cast<int64_t>(in[0].size()) / n;
    launch(stream(), [=, chosen = chosen_, scores = in[0].data<float>(), to = out[0].data<uint32_t>()] {
      parallel_ranges(rows, kRows, [&](int64_t r, int64_t end) {
        for (; r < end; r++) {
          const float* row = scores + r * n;
          uint32_t* best = to + r * chosen;
          int64_t found = 0;
          for (int64_t i = 0; i < n; i++) {
            if (found == chosen && !(row[i] > row[best[chosen - 1]])) {
              continue;
            }
            int64_t at = found < chosen ? found++ : chosen - 1;
            for (; at > 0 && row[i] > row[best[at - 1]]; at--) {
              best[at] = best[at - 1];
            }
            best[at] = static_cast<uint32_t>(i);
          }
        }
      });
    });
  }

 private:
  int64_t chosen_;
};

mx::array plain(const mx::array& a, const mx::Shape& shape, const char* what) {
  require(a.shape() == shape, what);
  return plain_input(a, static_cast<int>(a.ndim()), what);
}

} // namespace

std::vector<mx::array> add_norm(const mx::array& x, const mx::array& y, const mx::array& weight, float eps) {
  mx::Stream stream = train_stream("add_norm");
  require(x.ndim() > 0 && x.size() > 0, "add_norm: expected rows");
  std::vector<mx::array> in{plain(x, x.shape(), "add_norm: x"), plain(y, x.shape(), "add_norm: y is not like x"),
                            plain(weight, {x.shape(-1)}, "add_norm: the weight is not like a row")};
  return mx::array::make_arrays({x.shape(), x.shape()}, {mx::float32, mx::float32}, std::make_shared<AddNorm>(stream, eps), in);
}

std::vector<mx::array> add_norm_vjp(const mx::array& sum, const mx::array& weight, const mx::array& d_sum,
                                    const mx::array& d_normed, float eps) {
  mx::Stream stream = train_stream("add_norm_vjp");
  std::vector<mx::array> in{plain(sum, sum.shape(), "add_norm_vjp: the sum"),
                            plain(weight, {sum.shape(-1)}, "add_norm_vjp: the weight is not like a row"),
                            plain(d_sum, sum.shape(), "add_norm_vjp: a cotangent is not like the sum"),
                            plain(d_normed, sum.shape(), "add_norm_vjp: a cotangent is not like the sum")};
  return mx::array::make_arrays({sum.shape(), weight.shape()}, {mx::float32, mx::float32},
                                std::make_shared<AddNormVjp>(stream, eps), in);
}

mx::array best_experts(const mx::array& scores, int chosen) {
  mx::Stream stream = train_stream("best_experts");
  require(scores.ndim() > 0 && chosen > 0 && chosen <= scores.shape(-1), "best_experts: too few experts");
  mx::Shape shape = scores.shape();
  shape.back() = chosen;
  return mx::array(shape, mx::uint32, std::make_shared<BestExperts>(stream, chosen), {plain(scores, scores.shape(), "best_experts: scores")});
}

} // namespace edger1
