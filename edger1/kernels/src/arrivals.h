// Which slots of a bank hold what they are to hold: how whoever reads experts from disk tells the operation that waits for
// them. Knows nothing of experts.
//
// A slot that nobody expects anything in counts as arrived. Each function may be called from any thread. Whoever gives up on
// a read must see to it that it has ended before the slot is expected again: a late done() would be taken for the new one's.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace edger1 {

class Arrivals {
 public:
  enum class State : uint8_t { arrived, expected, failed };

  // Throws std::invalid_argument below 1.
  explicit Arrivals(int64_t slots);

  // Each throws std::invalid_argument for a slot that there is not.
  void expect(const std::vector<int64_t>& slots);
  void done(int64_t slot);
  void fail(int64_t slot);

  // Releases all who wait, and all who would until reset().
  void abort();
  // Nothing expected, failed or aborted any more.
  void reset();

  int64_t slots() const {
    return slots_;
  }
  std::vector<int64_t> failed() const;
  bool aborted() const {
    return aborted_.load(std::memory_order_acquire);
  }
  // Seconds that were spent in wait() so far.
  double waited_s() const;

  // What was written to the slot before done() is seen by who finds it arrived. Slots beyond the last have arrived.
  State state(int64_t slot) const {
    return slot < slots_ ? states_[slot].load(std::memory_order_acquire) : State::arrived;
  }
  // Sleeps until one of the slots is not expected any more; false if it was aborted instead.
  bool wait(const std::vector<int64_t>& slots);

 private:
  void set(int64_t slot, State state);

  int64_t slots_;
  std::unique_ptr<std::atomic<State>[]> states_;
  std::atomic<bool> aborted_{false};
  mutable std::mutex mutex_; // of every change, so that none is missed between looking and sleeping
  std::condition_variable changed_;
  double waited_s_ = 0;
};

} // namespace edger1
