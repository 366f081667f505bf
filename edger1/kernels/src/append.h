// Writing rows into a cache in place: what mlx-lm's KV caches do for every token.
//
// MLX's own slice assignment writes in place only if nobody else holds the buffer, and an operation that is queued but has
// not run yet counts as somebody: decoding one step ahead, as mlx-lm does, copies every cache for every token. Operations of
// ours that read a cache say so here, and the assignment discounts those that are queued before it on the same stream.
#pragma once

#include <vector>

#include "ops_common.h"

namespace edger1 {

// `buffer[..., start:start + L, :] = rows`, as a new array that shares the buffer where nothing else needs the old one.
// The shapes are equal but for axis -2, the dtypes equal.
mx::array append_rows(const mx::array& buffer, const mx::array& rows, int start, mx::StreamOrDevice s = {});

// Whether `a`, an input of the operation that asks in its eval_cpu, is the only holder of its buffer but for tasks queued on
// this stream that said so by reading(). Where such a task has just ended, it waits for MLX to let go of what that has read.
bool sole_holder(const mx::array& a, const mx::Stream& stream);

// Marks the buffers of `inputs` as read by a task that is about to be queued, which must hold a ReadingDone of the result.
std::vector<const void*> reading(const std::vector<mx::array>& inputs, const mx::Stream& stream);

// Takes the marks away when it goes, be it by an exception.
struct ReadingDone {
  const std::vector<const void*>& buffers;
  int stream;
  ~ReadingDone();
};

} // namespace edger1
