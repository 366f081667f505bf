#include "arrivals.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

namespace edger1 {

Arrivals::Arrivals(int64_t slots) : slots_(slots) {
  if (slots < 1) {
    throw std::invalid_argument("arrivals: there are " + std::to_string(slots) + " slots; expected one or more");
  }
  states_.reset(new std::atomic<State>[static_cast<size_t>(slots)]);
  reset();
}

void Arrivals::set(int64_t slot, State state) {
  if (slot < 0 || slot >= slots_) {
    throw std::invalid_argument("arrivals: slot " + std::to_string(slot) + " where there are " + std::to_string(slots_));
  }
  states_[slot].store(state, std::memory_order_release);
}

void Arrivals::expect(const std::vector<int64_t>& slots) {
  std::lock_guard lock(mutex_);
  for (int64_t slot : slots) {
    set(slot, State::expected);
  }
}

void Arrivals::done(int64_t slot) {
  {
    std::lock_guard lock(mutex_);
    set(slot, State::arrived);
  }
  changed_.notify_all();
}

void Arrivals::fail(int64_t slot) {
  {
    std::lock_guard lock(mutex_);
    set(slot, State::failed);
  }
  changed_.notify_all();
}

void Arrivals::abort() {
  {
    std::lock_guard lock(mutex_);
    aborted_.store(true, std::memory_order_release);
  }
  changed_.notify_all();
}

void Arrivals::reset() {
  {
    std::lock_guard lock(mutex_);
    for (int64_t slot = 0; slot < slots_; slot++) {
      set(slot, State::arrived);
    }
    aborted_.store(false, std::memory_order_release);
  }
  changed_.notify_all();
}

std::vector<int64_t> Arrivals::failed() const {
  std::vector<int64_t> found;
  for (int64_t slot = 0; slot < slots_; slot++) {
    if (state(slot) == State::failed) {
      found.push_back(slot);
    }
  }
  return found;
}

double Arrivals::waited_s() const {
  std::lock_guard lock(mutex_);
  return waited_s_;
}

bool Arrivals::wait(const std::vector<int64_t>& slots) {
  std::unique_lock lock(mutex_);
  auto begin = std::chrono::steady_clock::now();
  bool any = false;
  changed_.wait(lock, [&] {
    any = std::any_of(slots.begin(), slots.end(), [&](int64_t slot) { return state(slot) != State::expected; });
    return any || aborted();
  });
  waited_s_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return any;
}

} // namespace edger1
