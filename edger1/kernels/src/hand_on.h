// Arrays that an operation leaves behind beside its one result: caches that it has written in place.
//
// As further outputs they would be held by MLX while the operation is queued, or, where such an output is the one that is
// evaluated, just not held by it. Either way nobody could say who holds a cache, and what is held by others is not written
// in place. So each is the output of an operation of its own, which only hands a buffer on.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "primitive.h"

namespace edger1 {

// Where the operation leaves its arrays for those that hand them on.
struct Written {
  std::vector<mx::array> caches;
};

// Input: the result of the operation, so that it has run. Output: one of what it left.
class HandOn : public CpuPrimitive {
 public:
  HandOn(mx::Stream stream, std::shared_ptr<Written> written, size_t index)
      : CpuPrimitive(stream), written_(std::move(written)), index_(index) {}

  const char* name() const override {
    return "EdgeR1HandOn";
  }

  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>& outputs) override {
    // The output must be its buffer's only holder when it is written next.
    outputs[0].copy_shared_buffer(std::exchange(written_->caches[index_], mx::array({}, mx::float32, nullptr, {})));
  }

 private:
  std::shared_ptr<Written> written_;
  size_t index_;
};

// The array of cache's shape that `result`, an operation's that leaves it as written->caches[index], hands on.
inline mx::array handed_on(const mx::array& result, const mx::array& cache, std::shared_ptr<Written> written, size_t index) {
  auto op = std::make_shared<HandOn>(result.primitive().stream(), std::move(written), index);
  return mx::array(cache.shape(), cache.dtype(), std::move(op), {result});
}

} // namespace edger1
