#include "train_ops.h"

#include "cpu_features.h"
#include "train_common.h"
#include "update_table.h"

namespace edger1 {

const UpdateTable& update_table() {
#if defined(__x86_64__)
  static const UpdateTable& table = table_for_isa<UpdateTable>(&update_portable, &update_avx2, &update_avx512vnni, nullptr);
#elif defined(__aarch64__)
  static const UpdateTable& table = table_for_isa<UpdateTable>(&update_portable, nullptr, nullptr, &update_neon);
#else
  static const UpdateTable& table = update_portable;
#endif
  return table;
}

namespace {

constexpr int64_t kGrain = 1 << 15; // elements; fixed, so that sums do not depend on the threads

Matrix matrix_of(const mx::array& a) {
  return {a.data<void>(), Float::f32, a.shape(-2) == 1 ? a.shape(-1) : a.strides(-2),
          a.shape(-1) == 1 ? 1 : a.strides(-1)};
}

// Whether rows or columns lie close together. A row by itself must: the packers take what is no row for columns, and
// read on from each of them.
bool unit_stride(const mx::array& a) {
  return a.strides(-1) == 1 || a.shape(-1) == 1 || (a.strides(-2) == 1 && a.shape(-2) > 1);
}

class MixedMatmul : public TrainPrimitive {
 public:
  using TrainPrimitive::TrainPrimitive;
  const char* name() const override {
    return "EdgeR1MixedMatmul";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& outputs) override {
    auto& out = outputs[0];
    allocate(out);
    std::vector<mx::array> plain;
    for (const auto& one : in) {
      plain.push_back(unit_stride(one) ? one : contiguous_now(one));
    }
    const auto &a = plain[0], &b = plain[1];
    int64_t m = a.shape(-2), k = a.shape(-1), n = b.shape(-1);
    Matrix left = matrix_of(a), right = matrix_of(b);
    RowMap left_at(a, 2), right_at(b, 2);
    int64_t batch = left_at.rows();
    bool shared = b.ndim() == 2;
    if (shared) {
      RowMap rows(a, 1);
      if (rows.uniform() || rows.rows() == 1) {
        m = rows.rows();
        left.row_stride = rows.rows() == 1 ? k : rows.stride();
        batch = 1;
      }
    }
    launch(stream(), [=, &g = gemm_engine(true), c = out.data<float>()] {
      if (batch > 1 && m * n * k <= (int64_t{1} << 24)) {
        parallel_for(batch, [&](int64_t i) {
          engine_matmul_serial(g, c + i * m * n, n, left.at(left_at(i)), shared ? right : right.at(right_at(i)), m, n, k);
        });
        return;
      }
      for (int64_t i = 0; i < batch; i++) {
        engine_matmul(g, c + i * m * n, n, left.at(left_at(i)), shared ? right : right.at(right_at(i)), m, n, k);
      }
    });
  }

 private:
  // A copy filled before this primitive runs on the same stream.
  mx::array contiguous_now(const mx::array& a) {
    mx::array copy(a.shape(), a.dtype(), nullptr, {});
    allocate(copy);
    mx::cpu::get_command_encoder(stream()).add_temporary(copy);
    RowMap rows(a, 1);
    launch(stream(), [rows, n = a.shape(-1), stride = a.strides(-1), from = a.data<float>(), to = copy.data<float>()] {
      for (int64_t r = 0; r < rows.rows(); r++) {
        const float* row = from + rows(r);
        for (int64_t i = 0; i < n; i++) {
          to[r * n + i] = row[i * stride];
        }
      }
    });
    return copy;
  }
};

class AdamWStep : public TrainPrimitive {
 public:
  AdamWStep(mx::Stream s, AdamW with) : TrainPrimitive(s), with_(with) {}
  const char* name() const override {
    return "EdgeR1AdamW";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    // Outputs w, m, v take over the buffers of inputs w, m, v that nobody else holds.
    const int from[3] = {0, 2, 3};
    for (int i = 0; i < 3; i++) {
      if (in[from[i]].is_donatable()) {
        out[i].copy_shared_buffer(in[from[i]]);
      } else {
        allocate(out[i]);
      }
    }
    launch(stream(), [with = with_, n = static_cast<int64_t>(in[0].size()), w = in[0].data<float>(),
                      g = in[1].data<float>(), m = in[2].data<float>(), v = in[3].data<float>(),
                      w_out = out[0].data<float>(), m_out = out[1].data<float>(), v_out = out[2].data<float>()] {
      parallel_ranges(n, kGrain, [&](int64_t i, int64_t end) {
        update_table().adamw(w_out + i, m_out + i, v_out + i, w + i, g + i, m + i, v + i, end - i, with);
      });
    });
  }

 private:
  AdamW with_;
};

class Blend : public TrainPrimitive {
 public:
  Blend(mx::Stream s, float a, float b) : TrainPrimitive(s), a_(a), b_(b) {}
  const char* name() const override {
    return "EdgeR1Blend";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    if (in[0].is_donatable()) {
      out[0].copy_shared_buffer(in[0]);
    } else if (in[1].is_donatable()) {
      out[0].copy_shared_buffer(in[1]);
    } else {
      allocate(out[0]);
    }
    launch(stream(), [a = a_, b = b_, n = static_cast<int64_t>(in[0].size()), x = in[0].data<float>(),
                      y = in[1].data<float>(), to = out[0].data<float>()] {
      parallel_ranges(n, kGrain, [&](int64_t i, int64_t end) { update_table().blend(to + i, x + i, a, y + i, b, end - i); });
    });
  }

 private:
  float a_, b_;
};

class SquaredNorm : public TrainPrimitive {
 public:
  using TrainPrimitive::TrainPrimitive;
  const char* name() const override {
    return "EdgeR1SquaredNorm";
  }
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    launch(stream(), [n = static_cast<int64_t>(in[0].size()), x = in[0].data<float>(), to = out[0].data<float>()] {
      std::vector<double> parts(static_cast<size_t>((n + kGrain - 1) / kGrain));
      parallel_ranges(n, kGrain, [&](int64_t i, int64_t end) {
        parts[static_cast<size_t>(i / kGrain)] = update_table().squares(x + i, end - i);
      });
      double sum = 0;
      for (double part : parts) {
        sum += part;
      }
      *to = static_cast<float>(sum);
    });
  }
};

mx::array flat_input(const mx::array& a, const mx::Shape& shape, const char* what) {
  require(a.shape() == shape, "an optimizer's arrays must have one shape");
  return plain_input(a, static_cast<int>(a.ndim()), what);
}

} // namespace

mx::array mixed_matmul(const mx::array& a_in, const mx::array& b_in) {
  mx::Stream stream = train_stream("mixed_matmul");
  mx::array a = a_in, b = b_in;
  require(a.dtype() == mx::float32 && b.dtype() == mx::float32, "mixed_matmul: expected float32 arrays");
  require(a.ndim() >= 2 && b.ndim() >= 2 && a.shape(-1) == b.shape(-2), "mixed_matmul: expected [..., M, K] and [..., K, N]");
  if (b.ndim() > 2) {
    require(b.ndim() == a.ndim() && std::equal(a.shape().begin(), a.shape().end() - 2, b.shape().begin()),
            "mixed_matmul: batch axes differ");
  }
  mx::Shape shape = a.shape();
  shape.back() = b.shape(-1);
  return mx::array(shape, mx::float32, std::make_shared<MixedMatmul>(stream), {a, b});
}

std::vector<mx::array> adamw(const mx::array& w, const mx::array& g, const mx::array& m, const mx::array& v,
                             float gradient_scale, float rate, float beta1, float beta2, float epsilon, float decay,
                             float first, float second) {
  mx::Stream stream = train_stream("adamw");
  AdamW with{gradient_scale, rate, beta1, beta2, epsilon, decay, first, second};
  std::vector<mx::array> in{flat_input(w, w.shape(), "adamw: the weights"), flat_input(g, w.shape(), "adamw: the gradient"),
                            flat_input(m, w.shape(), "adamw: a moment"), flat_input(v, w.shape(), "adamw: a moment")};
  return mx::array::make_arrays({w.shape(), w.shape(), w.shape()}, std::vector<mx::Dtype>(3, mx::float32),
                                std::make_shared<AdamWStep>(stream, with), in);
}

mx::array blend(const mx::array& x, float a, const mx::array& y, float b) {
  mx::Stream stream = train_stream("blend");
  return mx::array(x.shape(), mx::float32, std::make_shared<Blend>(stream, a, b),
                   {flat_input(x, x.shape(), "blend: x"), flat_input(y, x.shape(), "blend: y")});
}

mx::array squared_norm(const mx::array& x) {
  mx::Stream stream = train_stream("squared_norm");
  return mx::array(mx::Shape{}, mx::float32, std::make_shared<SquaredNorm>(stream),
                   {plain_input(x, static_cast<int>(x.ndim()), "squared_norm: the array")});
}

} // namespace edger1
