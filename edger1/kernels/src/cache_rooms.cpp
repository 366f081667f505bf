#include "cache_rooms.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <vector>

#include "ops_table.h"
#include "pool.h"

namespace edger1 {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kRoomBytes = int64_t{8} << 20;
constexpr int64_t kLine = 64;
constexpr float kLargestHalf = 65504;

int64_t lines(int64_t bytes) {
  return (bytes + kLine - 1) / kLine * kLine;
}

// Memory that the system gives for the first time costs several times what writing it does, and on virtual machines far
// more than that: a few rooms wait for the next prompt.
constexpr int64_t kMostSpare = 8;

struct Mapping {
  char* mapped;
  int64_t touched; // bytes of it that the system has given
};

struct InUse {
  uintptr_t end;
  int64_t touched;
};

struct Registry {
  std::mutex mutex;
  std::map<uintptr_t, InUse> rooms; // by their first addresses
  std::vector<Mapping> spare;       // rooms of the usual size that nobody uses
  size_t most_spare = kMostSpare;
};

// Never destroyed: MLX may let go of arrays while the process exits.
Registry& registry() {
  static auto* found = new Registry;
  return *found;
}

size_t mapped_bytes(int64_t room_bytes) {
  return static_cast<size_t>(room_bytes + kHugePage);
}

} // namespace

// A mapping of its own, on huge pages from the beginning.
struct CacheRooms::Room {
  char* mapped = nullptr;
  char* begin = nullptr;
  int64_t bytes = 0;
  bool zero = true; // nothing was written in it yet

  explicit Room(int64_t wanted) : bytes(std::max(wanted, kRoomBytes)) {
    Registry& all = registry();
    std::unique_lock lock(all.mutex);
    int64_t touched = 0;
    if (bytes == kRoomBytes && !all.spare.empty()) {
      mapped = all.spare.back().mapped;
      touched = all.spare.back().touched;
      all.spare.pop_back();
      zero = false;
    }
    lock.unlock();
    if (!mapped) {
      void* found = mmap(nullptr, mapped_bytes(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (found == MAP_FAILED) {
        return;
      }
      mapped = static_cast<char*>(found);
    }
    begin = mapped + (kHugePage - reinterpret_cast<intptr_t>(mapped) % kHugePage) % kHugePage;
    // Only whole pages, so that no memory is taken that holds nothing.
    madvise(begin, static_cast<size_t>(bytes / kHugePage * kHugePage), MADV_HUGEPAGE);
    lock.lock();
    all.rooms[reinterpret_cast<uintptr_t>(begin)] = {reinterpret_cast<uintptr_t>(begin + bytes), touched};
  }
  ~Room() {
    if (!mapped) {
      return;
    }
    Registry& all = registry();
    std::unique_lock lock(all.mutex);
    auto mine = all.rooms.find(reinterpret_cast<uintptr_t>(begin));
    int64_t touched = mine->second.touched;
    all.rooms.erase(mine);
    if (bytes == kRoomBytes && all.spare.size() < all.most_spare) {
      all.spare.push_back({mapped, touched});
      return;
    }
    lock.unlock();
    munmap(mapped, mapped_bytes(bytes));
  }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;

  // Note that its first bytes are about to be written.
  void touch(int64_t first) const {
    Registry& all = registry();
    std::lock_guard lock(all.mutex);
    int64_t& touched = all.rooms.at(reinterpret_cast<uintptr_t>(begin)).touched;
    touched = std::max(touched, std::min(bytes, (first + kHugePage - 1) / kHugePage * kHugePage));
  }
};

bool lies_in_room(const mx::array& a) {
  auto at = reinterpret_cast<uintptr_t>(a.data_shared_ptr()->buffer().ptr());
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  auto after = all.rooms.upper_bound(at);
  return after != all.rooms.begin() && at < std::prev(after)->second.end;
}

int64_t cache_room_bytes() {
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  int64_t sum = 0;
  for (const auto& [begin, room] : all.rooms) {
    sum += room.touched;
  }
  for (const Mapping& each : all.spare) {
    sum += each.touched;
  }
  return sum;
}

void keep_spare_rooms(int64_t most_bytes) {
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  all.most_spare = static_cast<size_t>(std::clamp<int64_t>(most_bytes / kRoomBytes, 0, kMostSpare));
  while (all.spare.size() > all.most_spare) {
    munmap(all.spare.back().mapped, mapped_bytes(kRoomBytes));
    all.spare.pop_back();
  }
}

std::optional<mx::array> CacheRooms::hold(const mx::array& a, int used, int capacity, mx::Dtype dtype) {
  mx::array source = a;
  source.wait();
  bool same = dtype == source.dtype();
  if (source.ndim() < 2 || !source.flags().row_contiguous || source.data_size() != source.size() || source.size() == 0 ||
      used < 0 || used > source.shape(-2) || used > capacity ||
      (!same && !(source.dtype() == mx::float32 && dtype == mx::float16))) {
    return std::nullopt;
  }
  mx::Shape shape = source.shape();
  shape[shape.size() - 2] = capacity;
  int64_t length = source.shape(-2), width = source.shape(-1), groups = static_cast<int64_t>(source.size()) / (length * width);
  auto size = static_cast<int64_t>(mx::size_of(dtype));
  // MLX's allocator has the size of an allocation in front of it, and whoever asks for it reads it there.
  int64_t bytes = groups * capacity * width * size, taken = kLine + lines(bytes);
  if (!room_ || used_ + taken > room_->bytes) {
    room_ = std::make_shared<Room>(taken);
    used_ = 0;
    if (!room_->begin) {
      room_.reset();
      return std::nullopt;
    }
  }
  char* to = room_->begin + used_ + kLine;
  auto* in_front = reinterpret_cast<size_t*>(to) - 1;
  mx::allocator::Buffer buffer(in_front);
  if (buffer.raw_ptr() != to) {
    return std::nullopt;
  }
  room_->touch(used_ + taken);
  *in_front = static_cast<size_t>(bytes);
  used_ += taken;
  const char* from = source.data<char>();
  int64_t from_size = source.itemsize();
  parallel_ranges(groups * used, grain_for(groups * used, static_cast<double>(width * size), 65536),
                  [&](int64_t begin, int64_t end) {
                    std::vector<float> row(same ? 0 : static_cast<size_t>(width));
                    for (int64_t r = begin; r < end; r++) {
                      const char* in = from + (r / used * length + r % used) * width * from_size;
                      char* out = to + (r / used * capacity + r % used) * width * size;
                      if (same) {
                        std::memcpy(out, in, static_cast<size_t>(width * size));
                        continue;
                      }
                      for (int64_t i = 0; i < width; i++) {
                        row[static_cast<size_t>(i)] =
                            std::clamp(reinterpret_cast<const float*>(in)[i], -kLargestHalf, kLargestHalf);
                      }
                      ops().from_f32(out, Float::f16, row.data(), width);
                    }
                  });
  int64_t rest = (capacity - used) * width * size;
  for (int64_t g = 0; g < groups && !room_->zero; g++) {
    std::memset(to + g * capacity * width * size + used * width * size, 0, static_cast<size_t>(rest));
  }
  mx::allocator::Data data(buffer, [room = room_](mx::allocator::Buffer) {});
  return mx::array(std::move(data), std::move(shape), dtype);
}

} // namespace edger1
