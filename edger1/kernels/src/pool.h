// The thread pool that every kernel shares: one thread for each physical core, the calling thread among them.
//
// A job is a number of chunks; threads claim them one by one with a single compare-and-swap, so that a worker which the
// system is slow to wake costs nothing: nobody waits for a thread that holds no chunk. Workers spin for a moment after
// the last job, because the next operation of a decoding model is microseconds away, and then sleep.
//
// One job runs at a time. A caller that finds the pool busy (another MLX stream) and a nested call run their chunks on
// their own thread. Results must therefore not depend on who computes a chunk, nor on how many threads there are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace edger1 {

// Threads that a job uses at most, the caller included: the physical cores this process may run on (its affinity mask
// and cgroup quota count), or EDGER1_THREADS.
int pool_threads();

// Changes pool_threads() from the next job on; waits for a running one. Throws std::invalid_argument outside 1..256.
void set_pool_threads(int n);

// Throws std::runtime_error in a process that was forked from one which had used the kernels: neither the pool's threads
// nor MLX's exist there.
void refuse_if_forked();

// As refuse_if_forked(), and remembers that the kernels were used. Whoever starts a job from outside calls it first.
void note_use();

// A buffer of this thread's own of at least `bytes` (64-byte aligned), kept and reused; the next call with the same slot
// may move it. Slot 0 belongs to whoever runs a chunk, slot 1 to whoever calls parallel_for.
void* thread_scratch(int slot, size_t bytes);
// What all threads that live hold of it.
int64_t scratch_bytes();

namespace detail {
using ChunkFunction = void (*)(void* context, int64_t chunk);
void run_chunks(int64_t n_chunks, ChunkFunction function, void* context);
} // namespace detail

// Calls body(chunk) for each chunk in [0, n_chunks), in no order, and returns when all are done. An exception from a body
// is rethrown here after the other chunks have run.
template <class Body>
void parallel_for(int64_t n_chunks, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  detail::run_chunks(
      n_chunks, [](void* context, int64_t chunk) { (*static_cast<Plain*>(context))(chunk); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Calls body(begin, end) over ranges that cover [0, n), each a multiple of `grain` long but for the last.
template <class Body>
void parallel_ranges(int64_t n, int64_t grain, Body&& body) {
  parallel_for((n + grain - 1) / grain, [&](int64_t chunk) {
    int64_t begin = chunk * grain;
    body(begin, begin + grain < n ? begin + grain : n);
  });
}

// A grain for parallel_ranges: chunks of at least `cost_floor` (in the caller's unit, where one item costs
// `cost_per_item`), as many as four a thread where the work allows, and a multiple of `multiple` items.
int64_t grain_for(int64_t n, double cost_per_item, double cost_floor, int64_t multiple = 1);

// Memory that a thread will read in the next phase of a course: thread t from begin + t * step on.
struct Ahead {
  const void* begin = nullptr;
  int64_t step = 0, bytes = 0;
};

// Work in phases, each of which needs the results of the one before: what a token passes in a model. Threads go from one
// phase to the next without returning to a caller, and nobody waits for a thread that holds no piece. The first
// pool_threads() pieces of a phase belong to one thread each, which finds them while it waits (see ahead); others take them
// only when nothing else is left. An exception ends the course and is rethrown by run_course.
class Course {
 public:
  static constexpr int kAhead = 6;

  virtual ~Course() = default;

  // Called by one thread while no piece runs: does what cannot be shared and returns how many pieces the next phase has,
  // pool_threads() or more; 0 at the end. Parallel jobs started from here and from pieces run on the calling thread.
  virtual int64_t next() = 0;
  virtual void piece(int64_t i) = 0;

  // After next(): what to read ahead while waiting for the phase after the one that begins. Only a hint, and used even when
  // the course has ended.
  Ahead ahead[kAhead];
};

void run_course(Course& course);

} // namespace edger1
