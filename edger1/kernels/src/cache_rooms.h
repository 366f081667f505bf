// Memory for caches of keys and values: on huge pages that small arrays share, and MLX's own to write in place.
//
// Attention reads a cache once a token from end to end, like weights. A layer's keys of a small model take less than a
// huge page, so what MLX allocates for them lies on small ones, and looking those up costs a third of the read bandwidth.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "mlx/array.h"

namespace edger1 {

namespace mx = mlx::core;

// Whether the memory of an array is of a room, so that whoever alone holds it may write in it.
bool lies_in_room(const mx::array& a);

// Bytes that rooms hold, those included that wait to be used again.
int64_t cache_room_bytes();

// Lets rooms that nobody uses take `most_bytes` at most from here on, and at most 64 MB; what is above that is given back.
void keep_spare_rooms(int64_t most_bytes);

class CacheRooms {
 public:
  // A copy of the evaluated array [..., n, width] with `capacity` >= used rows in place of n: the first `used` ones of it as
  // `dtype`, which is its own or, for float32, float16 (what that cannot hold becomes its largest number), then zeros.
  // Nothing where that does not apply. Copies share mappings of a few megabytes, which go with the last of them but for
  // some that are used again.
  std::optional<mx::array> hold(const mx::array& a, int used, int capacity, mx::Dtype dtype);

 private:
  struct Room;
  std::shared_ptr<Room> room_;
  int64_t used_ = 0;
};

} // namespace edger1
