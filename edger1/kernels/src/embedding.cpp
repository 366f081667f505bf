#include "embedding.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "ops_common.h"
#include "qmm_driver.h"

namespace edger1 {
namespace {

struct Table {
  const uint8_t* codes;
  const void *scales, *biases;
  ScaleType type;
  int rows, columns, group, bits;
};

// Codes are packed little-endian without gaps, so that each lies in the two bytes where it begins.
void widen_row(const Table& table, int64_t row, float* scratch, float* to) {
  int groups = table.columns / table.group;
  int64_t row_bytes = int64_t{table.columns} * table.bits / 8, scale_bytes = table.type == ScaleType::f32 ? 4 : 2;
  const uint8_t* codes = table.codes + row * row_bytes;
  const QmmKernels& kernels = qmm_kernels();
  kernels.to_f32(static_cast<const char*>(table.scales) + row * groups * scale_bytes, table.type, groups, scratch);
  kernels.to_f32(static_cast<const char*>(table.biases) + row * groups * scale_bytes, table.type, groups, scratch + groups);
  unsigned mask = (1u << table.bits) - 1;
  for (int i = 0; i < table.columns; i++) {
    int64_t bit = int64_t{i} * table.bits, byte = bit >> 3;
    unsigned two = codes[byte] | (byte + 1 < row_bytes ? codes[byte + 1] << 8 : 0);
    float code = static_cast<float>((two >> (bit & 7)) & mask);
    to[i] = scratch[i / table.group] * code + scratch[groups + i / table.group];
  }
}

class EmbedRows : public CpuPrimitive {
 public:
  EmbedRows(mx::Stream stream, int group, int bits) : CpuPrimitive(stream), group_(group), bits_(bits) {}

  const char* name() const override {
    return "EdgeR1EmbedRows";
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const auto &w = inputs[1], &scales = inputs[2];
    auto& out = outputs[0];
    allocate(out);
    ScaleType type = scales.dtype() == mx::float32 ? ScaleType::f32
        : scales.dtype() == mx::float16            ? ScaleType::f16
                                                   : ScaleType::bf16;
    Table table{w.data<uint8_t>(), scales.data<void>(), inputs[3].data<void>(), type, w.shape(0), out.shape(-1), group_, bits_};
    bool is_signed = inputs[0].dtype() == mx::int32;
    RowMap place(inputs[0], 0);
    launch(stream(), [=, ids = inputs[0].data<uint32_t>(), count = static_cast<int64_t>(inputs[0].size()),
                      to = out.data<float>()] {
      parallel_ranges(count, grain_for(count, table.columns, 4096), [&](int64_t begin, int64_t end) {
        auto* scratch = static_cast<float*>(thread_scratch(0, sizeof(float) * 2 * static_cast<size_t>(table.columns)));
        for (int64_t i = begin; i < end; i++) {
          uint32_t id = ids[place(i)];
          int64_t row = is_signed ? int64_t{static_cast<int32_t>(id)} : int64_t{id};
          row = row < 0 ? row + table.rows : row;
          if (row < 0 || row >= table.rows) {
            std::fill_n(to + i * table.columns, table.columns, std::numeric_limits<float>::quiet_NaN());
          } else {
            widen_row(table, row, scratch, to + i * table.columns);
          }
        }
      });
    });
  }

 private:
  int group_, bits_;
};

bool ready(const mx::array& a) {
  return a.status() != mx::array::Status::unscheduled && a.flags().row_contiguous && !a.is_tracer();
}

} // namespace

std::optional<mx::array> embed_rows(const mx::array& ids, const mx::array& w, const mx::array& scales,
                                    const mx::array& biases, int group_size, int bits) {
  mx::Stream stream = mx::default_stream(mx::default_device());
  bool known = ((bits >= 2 && bits <= 6) || bits == 8) && (group_size == 32 || group_size == 64 || group_size == 128);
  if (stream.device != mx::Device(mx::Device::cpu) || !known || (ids.dtype() != mx::int32 && ids.dtype() != mx::uint32) ||
      ids.size() == 0 || ids.is_tracer() || w.dtype() != mx::uint32 || w.ndim() != 2 || !is_float(scales.dtype()) ||
      !ready(w) || !ready(scales) || !ready(biases)) {
    return std::nullopt;
  }
  int64_t columns = int64_t{w.shape(1)} * 32 / bits;
  mx::Shape expected{w.shape(0), static_cast<int>(columns / group_size)};
  if (columns % group_size != 0 || scales.shape() != expected || biases.shape() != expected ||
      biases.dtype() != scales.dtype()) {
    throw std::invalid_argument("embed_rows: scales or biases do not fit the codes; expected one of each for a group");
  }
  refuse_if_forked();
  mx::Shape shape = ids.shape();
  shape.push_back(static_cast<int>(columns));
  return mx::array(shape, mx::float32, std::make_shared<EmbedRows>(stream, group_size, bits), {ids, w, scales, biases});
}

} // namespace edger1
