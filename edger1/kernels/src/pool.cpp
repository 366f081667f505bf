#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "processors.h"

namespace edger1 {
namespace {

constexpr auto kSpin = std::chrono::microseconds(40);

// A ticket: shared chunks left, whether threads have chunks of their own, the job's generation.
constexpr uint64_t kLeft = (uint64_t{1} << 24) - 1;
constexpr uint64_t kOwned = uint64_t{1} << 24;
constexpr int kGenerationShift = 25;
constexpr uint64_t kGenerations = uint64_t{1} << (64 - kGenerationShift);

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// Set in the child of a fork, and only if the parent had used the pool.
std::atomic<bool> used{false};
std::atomic<bool> forked{false};

thread_local bool inside_job = false;

class Pool {
 public:
  // Never destroyed: a stream of MLX may still be running when the process exits. stop() at exit ends the workers.
  static Pool& instance() {
    static Pool* pool = [] {
      auto* made = new Pool();
      pthread_atfork(nullptr, nullptr, [] { forked.store(used.load()); });
      std::atexit([] { instance().stop_at_exit(); });
      return made;
    }();
    return *pool;
  }

  int threads() const {
    return threads_.load(std::memory_order_relaxed);
  }

  void set_threads(int n) {
    std::lock_guard lock(job_mutex_);
    if (n == threads()) {
      return;
    }
    join_workers();
    threads_.store(n);
  }

  void run(int64_t n, detail::ChunkFunction function, void* context) {
    if (n <= 0) {
      return;
    }
    std::unique_lock lock(job_mutex_, std::defer_lock);
    if (n == 1 || !available(lock)) {
      run_alone(n, function, context);
      return;
    }
    publish(n, function, context, nullptr);
    keep_apart();
    complete();
  }

  void run(Course& course) {
    auto function = [](void* context, int64_t chunk) { static_cast<Course*>(context)->piece(chunk); };
    std::unique_lock lock(job_mutex_, std::defer_lock);
    if (!available(lock)) {
      for (int64_t n = course.next(); n > 0; n = course.next()) {
        run_alone(n, function, &course);
      }
      return;
    }
    if (next_phase(course, function)) {
      keep_apart();
      complete();
    }
    rethrow();
  }

 private:
  Pool() : threads_(threads_at_start()) {}

  static void run_alone(int64_t n, detail::ChunkFunction function, void* context) {
    for (int64_t chunk = 0; chunk < n; chunk++) {
      function(context, chunk);
    }
  }

  // Takes the pool, unless this thread had better work alone.
  bool available(std::unique_lock<std::mutex>& lock) {
    if (inside_job || threads() == 1 || !lock.try_lock() || ended_) {
      return false;
    }
    start_workers();
    return true;
  }

  // A job, or a phase of `course`. All of its fields are written before the ticket that lets threads in.
  void publish(int64_t n, detail::ChunkFunction function, void* context, Course* course) {
    function_.store(function, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    course_.store(course, std::memory_order_relaxed);
    chunks_.store(n, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    over_.store(false, std::memory_order_relaxed);
    for (int i = 0; course && i < Course::kAhead; i++) {
      ahead_begin_[i].store(static_cast<const char*>(course->ahead[i].begin), std::memory_order_relaxed);
      ahead_step_[i].store(course->ahead[i].step, std::memory_order_relaxed);
      ahead_bytes_[i].store(course->ahead[i].bytes, std::memory_order_relaxed);
    }
    uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> kGenerationShift) + 1;
    if (generation == kGenerations) {
      generation = 1;
      for (auto& own : own_) {
        own.generation.store(0, std::memory_order_relaxed);
      }
    }
    uint64_t shared = course ? kOwned | static_cast<uint64_t>(n - threads()) : static_cast<uint64_t>(n);
    ticket_.store(generation << kGenerationShift | shared, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      wake_.fetch_add(1, std::memory_order_seq_cst);
      wake_.notify_all();
    }
  }

  // Goes on to the next phase; false at the end.
  bool next_phase(Course& course, detail::ChunkFunction function) {
    bool before = std::exchange(inside_job, true);
    int64_t n = 0;
    try {
      n = failed_.load(std::memory_order_acquire) ? 0 : course.next();
    } catch (...) {
      note_failure();
    }
    inside_job = before;
    if (n > 0) {
      publish(n, function, &course, &course);
    }
    return n > 0;
  }

  // The caller's part: works and waits until the job is over.
  void complete() {
    uint64_t seen = 0;
    int64_t looked = 0;
    for (int spins = 0; !over_.load(std::memory_order_acquire); spins++) {
      if (work(0, seen)) {
        spins = 0;
        looked = 0;
      } else if (look_ahead(0, looked)) {
        spins = 0;
      } else if (spins < 4000) {
        pause_briefly();
      } else {
        std::this_thread::yield();
      }
    }
    rethrow();
  }

  void rethrow() {
    if (failed_.load(std::memory_order_acquire)) {
      failed_.store(false, std::memory_order_relaxed);
      std::rethrow_exception(std::exchange(failure_, nullptr));
    }
  }

  void note_failure() {
    std::lock_guard lock(failure_mutex_);
    if (!failure_) {
      failure_ = std::current_exception();
    }
    failed_.store(true, std::memory_order_release);
  }

  // Runs chunks until none is left to claim; false if there were none, or none of another job than `seen`. A ticket is
  // (generation, whether threads have chunks of their own, shared chunks left). What the job is gets read before a claim; a
  // claim succeeds only if that job still had an unclaimed chunk all the while, and a job's fields are not written again
  // before its last chunk is finished. In a job with owned chunks every thread's mark is raised to its generation, so that a
  // claim for an earlier one fails.
  bool work(int thread, uint64_t& seen) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire), generation = ticket >> kGenerationShift;
    if (generation == seen) {
      return false;
    }
    auto function = function_.load(std::memory_order_relaxed);
    auto context = context_.load(std::memory_order_relaxed);
    auto course = course_.load(std::memory_order_relaxed);
    int64_t n = chunks_.load(std::memory_order_relaxed), done = 0;
    int all = threads();
    inside_job = true;
    if ((ticket & kOwned) && claim_own(thread, generation)) {
      run_chunk(function, context, thread);
      done++;
    }
    for (; ticket >> kGenerationShift == generation && (ticket & kLeft) != 0;) {
      if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        run_chunk(function, context, n - static_cast<int64_t>(ticket & kLeft));
        done++;
        ticket = ticket_.load(std::memory_order_acquire);
      }
    }
    for (int i = 1; (ticket & kOwned) && ticket >> kGenerationShift == generation && i < all; i++) {
      int other = (thread + i) % all;
      if (claim_own(other, generation)) {
        run_chunk(function, context, other);
        done++;
      }
    }
    inside_job = false;
    seen = generation;
    // Until this is added the job cannot end, so no later job's chunk was counted into `done`.
    if (done != 0 && finished_.fetch_add(done, std::memory_order_acq_rel) + done == n) {
      if (!course || !next_phase(*course, function)) {
        over_.store(true, std::memory_order_release);
      }
    }
    return done != 0;
  }

  bool claim_own(int thread, uint64_t generation) {
    auto& mark = own_[static_cast<size_t>(thread)].generation;
    uint64_t before = mark.load(std::memory_order_relaxed);
    return before < generation && mark.compare_exchange_strong(before, generation, std::memory_order_acq_rel);
  }

  void run_chunk(detail::ChunkFunction function, void* context, int64_t chunk) {
    try {
      function(context, chunk);
    } catch (...) {
      note_failure();
    }
  }

  // Asks for a little of what this thread will read next; false when it has all been asked for.
  bool look_ahead(int thread, int64_t& looked) {
    constexpr int64_t step = 256;
    bool any = false;
    for (int i = 0; i < Course::kAhead; i++) {
      if (looked < ahead_bytes_[i].load(std::memory_order_relaxed)) {
        const char* from = ahead_begin_[i].load(std::memory_order_relaxed) +
            thread * ahead_step_[i].load(std::memory_order_relaxed) + looked;
        for (int64_t at = 0; at < step; at += 64) {
          __builtin_prefetch(from + at, 0, 2);
        }
        any = true;
      }
    }
    looked += step;
    return any;
  }

  void worker_loop(int thread, uint64_t seen) {
    auto idle_since = std::chrono::steady_clock::now();
    int64_t looked = 0;
    for (;;) {
      if (stop_.load(std::memory_order_acquire)) {
        return;
      }
      if (work(thread, seen)) {
        idle_since = std::chrono::steady_clock::now();
        looked = 0;
        continue;
      }
      if (look_ahead(thread, looked)) {
        continue;
      }
      for (int i = 0; i < 16 && ticket_.load(std::memory_order_relaxed) >> kGenerationShift == seen; i++) {
        pause_briefly();
      }
      if (std::chrono::steady_clock::now() - idle_since > kSpin) {
        uint32_t woken = wake_.load(std::memory_order_seq_cst);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        if (ticket_.load(std::memory_order_seq_cst) >> kGenerationShift == seen && !stop_.load(std::memory_order_seq_cst)) {
          wake_.wait(woken, std::memory_order_seq_cst);
        }
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        idle_since = std::chrono::steady_clock::now();
      }
    }
  }

  // Sends the workers to other processors than the caller's. Left alone, the system may queue a woken worker behind the
  // very thread that it should help and leave it there for milliseconds. One system call a worker, when the caller has
  // moved since the last job.
  void keep_apart() {
    int here = sched_getcpu();
    if (here == avoided_) {
      return;
    }
    avoided_ = here;
    cpu_set_t others = allowed_;
    if (here >= 0 && here < CPU_SETSIZE) {
      CPU_CLR(here, &others);
    }
    // Without a processor for each thread the system knows better.
    if (CPU_COUNT(&others) + 1 >= threads()) {
      for (auto& worker : workers_) {
        pthread_setaffinity_np(worker.native_handle(), sizeof others, &others);
      }
    }
  }

  void start_workers() {
    if (!workers_.empty()) {
      return;
    }
    avoided_ = -1;
    // The last job is over: a thread that took no part in it has nothing to claim there.
    const uint64_t over = ticket_.load(std::memory_order_relaxed) >> kGenerationShift;
    for (auto& own : own_) {
      own.generation.store(over, std::memory_order_relaxed);
    }
    CPU_ZERO(&allowed_);
    sched_getaffinity(0, sizeof allowed_, &allowed_);
    for (int i = 1; i < threads(); i++) {
      workers_.emplace_back([this, i, over] {
        std::string name = "edger1-" + std::to_string(i);
        pthread_setname_np(pthread_self(), name.c_str());
        worker_loop(i, over);
      });
    }
  }

  void join_workers() {
    stop_.store(true, std::memory_order_seq_cst);
    wake_.fetch_add(1, std::memory_order_seq_cst);
    wake_.notify_all();
    for (auto& worker : workers_) {
      worker.join();
    }
    workers_.clear();
    stop_.store(false, std::memory_order_seq_cst);
  }

  void stop_at_exit() {
    if (forked.load()) {
      return;
    }
    std::lock_guard lock(job_mutex_);
    join_workers();
    ended_ = true;
  }

  std::mutex job_mutex_;
  std::atomic<int> threads_;
  std::vector<std::thread> workers_;
  bool ended_ = false;
  cpu_set_t allowed_{};
  int avoided_ = -1;

  alignas(64) std::atomic<uint64_t> ticket_{0};
  std::atomic<detail::ChunkFunction> function_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<Course*> course_{nullptr};
  std::atomic<int64_t> chunks_{0};
  std::atomic<const char*> ahead_begin_[Course::kAhead] = {};
  std::atomic<int64_t> ahead_step_[Course::kAhead] = {}, ahead_bytes_[Course::kAhead] = {};
  alignas(64) std::atomic<int64_t> finished_{0};
  std::atomic<bool> over_{false};
  alignas(64) std::atomic<uint32_t> wake_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};

  // The last job of which a thread's own chunk has been claimed.
  struct alignas(64) Own {
    std::atomic<uint64_t> generation{0};
  };
  Own own_[kMostThreads];

  std::mutex failure_mutex_;
  std::exception_ptr failure_;
  std::atomic<bool> failed_{false};
};

std::atomic<int64_t> scratch_total{0};

struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() {
    std::free(data);
    scratch_total -= static_cast<int64_t>(size);
  }
};

} // namespace

int pool_threads() {
  return Pool::instance().threads();
}

void set_pool_threads(int n) {
  if (n < 1 || n > kMostThreads) {
    throw std::invalid_argument("threads must be from 1 to 256, got " + std::to_string(n));
  }
  refuse_if_forked();
  Pool::instance().set_threads(n);
}

void refuse_if_forked() {
  if (forked.load(std::memory_order_relaxed)) {
    throw std::runtime_error(
        "this process was forked after EdgeR1's kernels had been used, and their threads do not survive a fork; "
        "start processes with the \"spawn\" method");
  }
}

void note_use() {
  refuse_if_forked();
  if (!used.load(std::memory_order_relaxed)) {
    Pool::instance();
    used.store(true);
  }
}

void* thread_scratch(int slot, size_t bytes) {
  static thread_local Scratch buffers[2];
  Scratch& buffer = buffers[slot];
  if (buffer.size < bytes) {
    std::free(std::exchange(buffer.data, nullptr));
    scratch_total -= static_cast<int64_t>(std::exchange(buffer.size, 0));
    size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, rounded);
    if (!buffer.data) {
      throw std::bad_alloc();
    }
    buffer.size = rounded;
    scratch_total += static_cast<int64_t>(rounded);
  }
  return buffer.data;
}

int64_t scratch_bytes() {
  return scratch_total.load();
}

int64_t grain_for(int64_t n, double cost_per_item, double cost_floor, int64_t multiple) {
  int64_t by_cost = static_cast<int64_t>(cost_floor / (cost_per_item > 0 ? cost_per_item : 1)) + 1;
  int64_t by_threads = n / (4 * int64_t{pool_threads()});
  int64_t grain = std::max<int64_t>({by_cost, by_threads, 1});
  return (grain + multiple - 1) / multiple * multiple;
}

namespace detail {
void run_chunks(int64_t n_chunks, ChunkFunction function, void* context) {
  constexpr auto most = static_cast<int64_t>(kLeft);
  if (n_chunks <= most) {
    Pool::instance().run(n_chunks, function, context);
    return;
  }
  struct Part {
    ChunkFunction function;
    void* context;
    int64_t begin;
  };
  for (int64_t begin = 0; begin < n_chunks; begin += most) {
    Part part{function, context, begin};
    auto one = [](void* p, int64_t chunk) {
      auto* part = static_cast<Part*>(p);
      part->function(part->context, part->begin + chunk);
    };
    Pool::instance().run(n_chunks - begin < most ? n_chunks - begin : most, one, &part);
  }
}
} // namespace detail

void run_course(Course& course) {
  Pool::instance().run(course);
}

} // namespace edger1
