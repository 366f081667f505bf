#include "select.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <vector>

namespace edger1 {
namespace {

enum class Element { f32, f16, bf16, i32, u32 };

bool known(mx::Dtype dtype) {
  return is_float(dtype) || dtype == mx::int32 || dtype == mx::uint32;
}

Element element_of(mx::Dtype dtype) {
  return dtype == mx::int32 ? Element::i32
      : dtype == mx::uint32 ? Element::u32
      : dtype == mx::float16 ? Element::f16
      : dtype == mx::bfloat16 ? Element::bf16
                              : Element::f32;
}

// An unsigned number in the order of the floats; both zeros are one, and all NaNs the largest.
uint32_t key_of(float x) {
  if (x != x) {
    return ~0u;
  }
  uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct KeyRows {
  const void* data;
  Element type;
  RowMap map;
  int64_t step;
  int64_t n;

  explicit KeyRows(const mx::array& a)
      : data(a.data<void>()), type(element_of(a.dtype())), map(a, 1), step(a.strides(-1)), n(a.shape(-1)) {}

  // Element i of row r as key << 32 | i: no two are the same, and their order is the stable one.
  void fetch(int64_t row, uint64_t* out) const {
    int64_t base = map(row);
    auto fill = [&](auto key) {
      for (int64_t i = 0; i < n; i++) {
        out[i] = uint64_t{key(base + i * step)} << 32 | static_cast<uint32_t>(i);
      }
    };
    if (type == Element::f32) {
      const auto* at = static_cast<const float*>(data);
      fill([=](int64_t i) { return key_of(at[i]); });
    } else if (type == Element::u32 || type == Element::i32) {
      const auto* at = static_cast<const uint32_t*>(data);
      uint32_t flip = type == Element::i32 ? 0x80000000u : 0;
      fill([=](int64_t i) { return at[i] ^ flip; });
    } else {
      const auto* at = static_cast<const uint16_t*>(data);
      Float half = type == Element::f16 ? Float::f16 : Float::bf16;
      fill([=](int64_t i) {
        float value;
        ops().to_f32(&value, at + i, half, 1);
        return key_of(value);
      });
    }
  }
};

constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;

// Sorts by the upper half; what is equal there stays in order. `other` is scratch for n.
void radix_sort(uint64_t* keys, uint64_t* other, int64_t n) {
  static thread_local std::vector<uint32_t> counts;
  counts.assign(size_t{3} * kDigits, 0);
  auto digit = [](uint64_t key, int pass) { return (key >> (32 + pass * kDigitBits)) & (kDigits - 1); };
  for (int64_t i = 0; i < n; i++) {
    for (int pass = 0; pass < 3; pass++) {
      counts[pass * kDigits + digit(keys[i], pass)]++;
    }
  }
  uint64_t* from = keys;
  uint64_t* to = other;
  for (int pass = 0; pass < 3; pass++) {
    uint32_t* at = counts.data() + pass * kDigits;
    if (at[digit(from[0], pass)] == n) {
      continue;
    }
    uint32_t sum = 0;
    for (int d = 0; d < kDigits; d++) {
      uint32_t count = at[d];
      at[d] = sum;
      sum += count;
    }
    for (int64_t i = 0; i < n; i++) {
      to[at[digit(from[i], pass)]++] = from[i];
    }
    std::swap(from, to);
  }
  if (from != keys) {
    std::memcpy(keys, from, sizeof(uint64_t) * static_cast<size_t>(n));
  }
}

void sort_keys(uint64_t* keys, uint64_t* other, int64_t n) {
  if (n < 1024) {
    std::sort(keys, keys + n);
  } else {
    radix_sort(keys, other, n);
  }
}

// As std::nth_element, with one pass over long rows that leaves only the neighbourhood of `kth` to it.
void select_keys(uint64_t* keys, uint64_t* other, int64_t n, int64_t kth) {
  if (n < 4096) {
    std::nth_element(keys, keys + kth, keys + n);
    return;
  }
  uint32_t counts[kDigits] = {};
  auto digit = [](uint64_t key) { return key >> (64 - kDigitBits); };
  for (int64_t i = 0; i < n; i++) {
    counts[digit(keys[i])]++;
  }
  int64_t below = 0;
  uint64_t middle = 0;
  while (below + counts[middle] <= kth) {
    below += counts[middle++];
  }
  int64_t low = 0, same = below, high = below + counts[middle];
  for (int64_t i = 0; i < n; i++) {
    uint64_t d = digit(keys[i]);
    int64_t& at = d < middle ? low : d == middle ? same : high;
    other[at++] = keys[i];
  }
  std::nth_element(other + below, other + kth, other + below + counts[middle]);
  std::memcpy(keys, other, sizeof(uint64_t) * static_cast<size_t>(n));
}

constexpr int kWhole = -1;   // sort everything

// Input [..., n]; output the indices or the values in their order, [..., n].
class Order : public DensePrimitive {
 public:
  Order(mx::Stream s, int kth, bool indices) : DensePrimitive(s), kth_(kth), indices_(indices) {}

  const char* name() const override {
    return "EdgeR1Order";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& that = static_cast<const Order&>(other);
    return kth_ == that.kth_ && indices_ == that.indices_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  std::vector<mx::array> fallback(const std::vector<mx::array>& in) override {
    mx::Stream s = stream();
    if (kth_ == kWhole) {
      return {indices_ ? mx::argsort(in[0], -1, s) : mx::sort(in[0], -1, s)};
    }
    return {indices_ ? mx::argpartition(in[0], kth_, -1, s) : mx::partition(in[0], kth_, -1, s)};
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    KeyRows rows(inputs[0]);
    auto* out = outputs[0].data<char>();
    launch(stream(), [=, kth = kth_, indices = indices_] {
      int64_t n = rows.n, count = rows.map.rows();
      // A logarithm's worth of passes at about a nanosecond an element.
      double cost = static_cast<double>(n) * (kth == kWhole ? 8 : 3);
      parallel_ranges(count, grain_for(count, cost, 20000), [&](int64_t begin, int64_t end) {
        auto* keys = static_cast<uint64_t*>(thread_scratch(0, sizeof(uint64_t) * 2 * static_cast<size_t>(n)));
        for (int64_t r = begin; r < end; r++) {
          rows.fetch(r, keys);
          if (kth == kWhole) {
            sort_keys(keys, keys + n, n);
          } else {
            select_keys(keys, keys + n, n, kth);
          }
          write(rows, r, keys, indices, out);
        }
      });
    });
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>&, const std::vector<mx::array>&) override {
    auto zeros = mx::zeros_like(primals[0], stream());
    return {indices_ ? zeros : mx::put_along_axis(zeros, order_of(primals[0]), cotangents[0], -1, stream())};
  }
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>&) override {
    if (indices_) {
      return {mx::zeros(primals[0].shape(), mx::uint32, stream())};
    }
    return {mx::take_along_axis(tangents[0], order_of(primals[0]), -1, stream())};
  }

 private:
  mx::array order_of(const mx::array& a) {
    return mx::array(a.shape(), mx::uint32, std::make_shared<Order>(stream(), kth_, true), {a});
  }

  static void write(const KeyRows& rows, int64_t row, const uint64_t* keys, bool indices, char* out) {
    int64_t n = rows.n;
    auto copy = [&](auto* to, auto value) {
      to += row * n;
      for (int64_t i = 0; i < n; i++) {
        to[i] = value(static_cast<uint32_t>(keys[i]));
      }
    };
    int64_t base = rows.map(row), step = rows.step;
    if (indices) {
      copy(reinterpret_cast<uint32_t*>(out), [](uint32_t i) { return i; });
    } else if (rows.type == Element::f16 || rows.type == Element::bf16) {
      const auto* from = static_cast<const uint16_t*>(rows.data) + base;
      copy(reinterpret_cast<uint16_t*>(out), [=](uint32_t i) { return from[i * step]; });
    } else {
      const auto* from = static_cast<const uint32_t*>(rows.data) + base;
      copy(reinterpret_cast<uint32_t*>(out), [=](uint32_t i) { return from[i * step]; });
    }
  }

  int kth_;
  bool indices_;
};

bool covered(const mx::array& a, int axis, const mx::StreamOrDevice& s) {
  int rank = static_cast<int>(a.ndim());
  return on_cpu(s) && known(a.dtype()) && rank >= 1 && rank <= RowMap::kMaxAxes && a.size() > 0 && axis >= -rank &&
      axis < rank;
}

// `axis` is moved to the end and back.
mx::array ordered(const mx::array& a, int axis, int kth, bool indices, const mx::StreamOrDevice& s) {
  mx::Stream stream = mx::to_stream(s);
  bool last = axis == -1 || axis == static_cast<int>(a.ndim()) - 1;
  mx::array rows = last ? a : mx::swapaxes(a, axis, -1, stream);
  mx::array out(rows.shape(), indices ? mx::uint32 : a.dtype(), std::make_shared<Order>(stream, kth, indices), {rows});
  return last ? out : mx::swapaxes(out, axis, -1, stream);
}

mx::array flat(const mx::array& a, const mx::StreamOrDevice& s) {
  return mx::flatten(a, s);
}

} // namespace

mx::array sort(const mx::array& a, std::optional<int> axis, mx::StreamOrDevice s) {
  if (!axis) {
    return sort(flat(a, s), -1, s);
  }
  return covered(a, *axis, s) ? ordered(a, *axis, kWhole, false, s) : mx::sort(a, *axis, s);
}

mx::array argsort(const mx::array& a, std::optional<int> axis, mx::StreamOrDevice s) {
  if (!axis) {
    return argsort(flat(a, s), -1, s);
  }
  return covered(a, *axis, s) ? ordered(a, *axis, kWhole, true, s) : mx::argsort(a, *axis, s);
}

mx::array partition(const mx::array& a, int kth, std::optional<int> axis, mx::StreamOrDevice s) {
  if (!axis) {
    return partition(flat(a, s), kth, -1, s);
  }
  bool ours = covered(a, *axis, s) && kth >= -a.shape(*axis) && kth < a.shape(*axis);
  return ours ? ordered(a, *axis, kth < 0 ? kth + a.shape(*axis) : kth, false, s) : mx::partition(a, kth, *axis, s);
}

mx::array argpartition(const mx::array& a, int kth, std::optional<int> axis, mx::StreamOrDevice s) {
  if (!axis) {
    return argpartition(flat(a, s), kth, -1, s);
  }
  bool ours = covered(a, *axis, s) && kth >= -a.shape(*axis) && kth < a.shape(*axis);
  return ours ? ordered(a, *axis, kth < 0 ? kth + a.shape(*axis) : kth, true, s) : mx::argpartition(a, kth, *axis, s);
}

mx::array topk(const mx::array& a, int k, std::optional<int> axis, mx::StreamOrDevice s) {
  if (!axis) {
    return topk(flat(a, s), k, -1, s);
  }
  if (!covered(a, *axis, s) || k < 1 || k >= a.shape(*axis)) {
    return mx::topk(a, k, *axis, s);
  }
  int n = a.shape(*axis), at = *axis < 0 ? *axis + static_cast<int>(a.ndim()) : *axis;
  mx::Shape begin(a.ndim(), 0), end = a.shape();
  begin[at] = n - k;
  return mx::slice(ordered(a, at, n - k, false, s), begin, end, s);
}

} // namespace edger1
