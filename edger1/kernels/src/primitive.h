// What every primitive of ours shares: it runs on a CPU stream of MLX, in the order of MLX's graph.
//
// eval_cpu runs on the thread that called mx.eval: it allocates the output and takes raw pointers, nothing else. The
// closure that it hands to launch() runs later, on the stream's own thread; MLX keeps the inputs' and outputs' buffers
// alive until it has run, so closures capture pointers and plain numbers and never arrays.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "pool.h"

namespace edger1 {

namespace mx = mlx::core;

class CpuPrimitive : public mx::Primitive {
 public:
  explicit CpuPrimitive(mx::Stream stream) : mx::Primitive(stream) {}

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error(std::string(name()) + " runs on the CPU only");
  }
};

// The stream an operation runs on; throws std::invalid_argument for a GPU one. Graph building is also where a forked
// process must be stopped: an exception out of eval_cpu makes MLX wait for stream threads, which a fork does not have.
inline mx::Stream cpu_stream(mx::StreamOrDevice s, const char* what) {
  refuse_if_forked();
  mx::Stream stream = mx::to_stream(s);
  if (stream.device != mx::Device(mx::Device::cpu)) {
    throw std::invalid_argument(std::string(what) + " runs on the CPU only, got a stream of another device");
  }
  return stream;
}

inline void allocate(mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
}

// Puts `task` (no arguments) on the stream's queue. Call it once in eval_cpu, after allocating.
template <class Task>
void launch(const mx::Stream& stream, Task&& task) {
  note_use();
  mx::cpu::get_command_encoder(stream).dispatch(std::forward<Task>(task));
}

// Calls visit(offset) for each index over all but the last `inner_dims` axes, in row-major order; offsets in elements.
template <class Visit>
void for_each_outer(const mx::array& a, int inner_dims, Visit&& visit) {
  int outer = static_cast<int>(a.ndim()) - inner_dims;
  std::vector<int> index(static_cast<size_t>(outer > 0 ? outer : 0), 0);
  int64_t total = 1;
  for (int i = 0; i < outer; i++) {
    total *= a.shape(i);
  }
  int64_t offset = 0;
  for (int64_t n = 0; n < total; n++) {
    visit(offset);
    for (int d = outer - 1; d >= 0; d--) {
      offset += a.strides(d);
      if (++index[d] < a.shape(d)) {
        break;
      }
      offset -= a.strides(d) * a.shape(d);
      index[d] = 0;
    }
  }
}

} // namespace edger1
