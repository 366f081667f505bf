#include "append.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "cache_rooms.h"

namespace edger1 {

// How many arrays share a's descriptor. MLX answers that only together with other questions (is_donatable), but an
// explicit instantiation may name a private member.
long descriptor_uses(const mx::array& a);

template <auto Member>
struct Reach {
  friend long descriptor_uses(const mx::array& a) {
    return (a.*Member).use_count();
  }
};
template struct Reach<&mx::array::array_desc_>;

namespace {

std::mutex readers_mutex;
struct Readers {
  int queued = 0;     // tasks of ours that read the buffer and have not ended
  bool ended = false; // one has ended since this was asked last, and MLX may be about to let go of what it has read
};
std::map<std::pair<const void*, int>, Readers> readers; // of a buffer on a stream
constexpr size_t kMostReaders = 4096;
// Long for what MLX does at once, and not too long for whoever asks: processors may have other work.
constexpr auto kPatience = std::chrono::seconds(1);

// How many hold the buffer of `a` but for queued tasks of ours, and whether such tasks have ended since this was asked last.
std::pair<long, bool> holders(const mx::array& a, int stream) {
  // This count is read first: a task drops its mark before MLX drops its hold, so that the difference may come out too
  // large but never too small.
  long uses = a.data_shared_ptr().use_count();
  std::lock_guard lock(readers_mutex);
  auto found = readers.find({a.data_shared_ptr().get(), stream});
  if (found == readers.end()) {
    return {uses, false};
  }
  Readers asked = found->second;
  if (asked.queued == 0) {
    readers.erase(found);
  } else {
    found->second.ended = false;
  }
  return {uses - asked.queued, asked.ended};
}

// Inputs: a buffer [..., S, D] and rows [..., L, D].
class AppendRows : public DensePrimitive {
 public:
  AppendRows(mx::Stream s, int start) : DensePrimitive(s), start_(start) {}

  const char* name() const override {
    return "EdgeR1AppendRows";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    mx::Shape begin(in[0].ndim(), 0), end = in[0].shape();
    begin[begin.size() - 2] = start_;
    end[end.size() - 2] = start_ + in[1].shape(-2);
    return {mx::slice_update(in[0], in[1], begin, end, stream())};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const auto &buffer = inputs[0], &rows = inputs[1];
    auto& out = outputs[0];
    bool in_place = buffer.flags().row_contiguous && buffer.data_size() == buffer.size() &&
        sole_holder(buffer, stream());
    if (in_place) {
      out.copy_shared_buffer(buffer);
    } else {
      allocate(out);
    }
    int64_t size = out.itemsize(), width = out.shape(-1), length = out.shape(-2), added = rows.shape(-2);
    int64_t groups = static_cast<int64_t>(out.size()) / (length * width);
    const char* from = rows.data<char>();
    const char* old = buffer.data<char>();
    char* to = out.data<char>();
    RowMap row_at(rows, 1), old_at(buffer, 1);
    int64_t step = rows.strides(-1), old_step = buffer.strides(-1), start = start_;
    auto copy_row = [=](char* target, const char* source, int64_t stride) {
      if (stride == 1 || width == 1) {
        std::memcpy(target, source, static_cast<size_t>(width * size));
        return;
      }
      for (int64_t i = 0; i < width; i++) {
        std::memcpy(target + i * size, source + i * stride * size, static_cast<size_t>(size));
      }
    };
    launch(stream(), [=] {
      if (!in_place) {
        parallel_ranges(groups * length, grain_for(groups * length, static_cast<double>(width * size), 65536),
                        [&](int64_t begin, int64_t end) {
                          for (int64_t r = begin; r < end; r++) {
                            copy_row(to + r * width * size, old + old_at(r) * size, old_step);
                          }
                        });
      }
      // Many rows at once are a whole cache that moves into a larger one.
      parallel_ranges(groups * added, grain_for(groups * added, static_cast<double>(width * size), 65536),
                      [&](int64_t begin, int64_t end) {
                        for (int64_t r = begin; r < end; r++) {
                          int64_t at = r / added * length + start + r % added;
                          copy_row(to + at * width * size, from + row_at(r) * size, step);
                        }
                      });
    });
  }

 private:
  int start_;
};

} // namespace

mx::array append_rows(const mx::array& buffer, const mx::array& rows, int start, mx::StreamOrDevice s) {
  return mx::array(buffer.shape(), buffer.dtype(), std::make_shared<AppendRows>(mx::to_stream(s), start),
                   {buffer, rows});
}

bool sole_holder(const mx::array& a, const mx::Stream& stream) {
  if (descriptor_uses(a) != 1 || !(a.data_shared_ptr()->is_owned() || lies_in_room(a))) {
    return false;
  }
  auto [count, ended] = holders(a, stream.index);
  if (count == 1 || !ended) {
    return count == 1;
  }
  // MLX lets go of what a task has read in a task of its own, behind that. It has only to run; a copy of a cache would cost
  // more, and memory that is in no plan.
  auto passed = std::make_shared<std::atomic<bool>>(false);
  mx::scheduler::enqueue(stream, [passed] { *passed = true; });
  auto until = std::chrono::steady_clock::now() + kPatience;
  while (holders(a, stream.index).first != 1) {
    if (*passed || std::chrono::steady_clock::now() > until) {
      return holders(a, stream.index).first == 1;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(10));
  }
  return true;
}

std::vector<const void*> reading(const std::vector<mx::array>& inputs, const mx::Stream& stream) {
  std::vector<const void*> buffers;
  std::lock_guard lock(readers_mutex);
  if (readers.size() > kMostReaders) {
    // Of buffers that nobody has asked about since.
    std::erase_if(readers, [](const auto& each) { return each.second.queued == 0; });
  }
  for (const auto& a : inputs) {
    const void* buffer = a.data_shared_ptr().get();
    bool known = false;
    for (const void* other : buffers) {
      known |= other == buffer;
    }
    // MLX holds each buffer once a task, however many inputs share it.
    if (!known) {
      buffers.push_back(buffer);
      readers[{buffer, stream.index}].queued++;
    }
  }
  return buffers;
}

ReadingDone::~ReadingDone() {
  std::lock_guard lock(readers_mutex);
  for (const void* buffer : buffers) {
    Readers& left = readers.find({buffer, stream})->second;
    left.queued--;
    left.ended = true;
  }
}

} // namespace edger1
