#include "qmm_driver.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "cpu_features.h"
#include "pool.h"
#include "qmm_tables.h"

namespace edger1 {

const QmmKernels& qmm_kernels() {
  static const QmmKernels chosen = [] {
    const QmmKernels& table = table_for_isa(qmm_portable, qmm_avx2, qmm_avx512vnni, qmm_neon);
    if (active_isa_has_amx()) {
      return qmm_with_amx(table);
    }
    return active_isa_has_avx_vnni() && qmm_avxvnni ? *qmm_avxvnni : table;
  }();
  return chosen;
}

namespace {

const QmmKernels& kernels() {
  return qmm_kernels();
}

constexpr int64_t kSmallChunkBytes = 8 << 10;  // weights below which splitting further costs more than it gains
constexpr int64_t kLargeChunkBytes = 48 << 10; // weights that the last claims in a large matrix take
constexpr int64_t kPanelRows = 768;            // rows of x that share one unpacking of a panel
constexpr int64_t kSerialPrepare = 1 << 15;    // elements of x below which preparing them is not worth a job

int64_t size_of(ScaleType type) {
  return type == ScaleType::f32 ? 4 : type == ScaleType::e8m0 ? 1 : 2;
}

// Row `row` of x as contiguous floats: in place where it is that already, else converted into `buffer`.
const float* row_as_f32(const RowSet& x, int64_t row, int64_t count, float* buffer) {
  const char* from = static_cast<const char*>(x.data) + x.offsets[row] * size_of(x.type);
  if (x.element_stride == 1) {
    if (x.type == ScaleType::f32) {
      return reinterpret_cast<const float*>(from);
    }
    kernels().to_f32(from, x.type, count, buffer);
    return buffer;
  }
  for (int64_t i = 0; i < count; i++) {
    const char* element = from + i * x.element_stride * size_of(x.type);
    if (x.type == ScaleType::f32) {
      buffer[i] = *reinterpret_cast<const float*>(element);
    } else {
      kernels().to_f32(element, x.type, 1, buffer + i);
    }
  }
  return buffer;
}

void for_all(int64_t n, bool serial, auto&& body) {
  if (serial) {
    for (int64_t i = 0; i < n; i++) {
      body(i);
    }
  } else {
    parallel_for(n, body);
  }
}

// A piece of work: rows [begin, end) of a group against columns [column0, column1) of the result.
struct Piece {
  int group;
  int64_t begin, end;
  int column0, column1;
};

class Run {
 public:
  explicit Run(const QmmJob& job) : job_(job), first_(job.groups[0].w), columns_(job.out_columns) {
    depth_ = job.transpose ? first_.k : first_.n;
    tile_ = job.transpose && job.fast ? kernels().tile_fast : kernels().tile_exact;
    packed_bytes_ = job.transpose ? kernels().packed_x_bytes(first_, job.fast) : kernels().packed_f32_bytes(first_.n);
    prepared_bytes_ = prepared_layout(first_.k, job.fast).bytes;
  }

  void operator()() {
    plan();
    prepare();
    parallel_for(static_cast<int64_t>(pieces_.size()), [&](int64_t i) {
      const Piece& piece = pieces_[static_cast<size_t>(i)];
      is_small(job_.groups[piece.group]) ? small_piece(piece) : large_piece(piece);
    });
  }

 private:
  bool is_small(const Group& group) const {
    return job_.transpose && group.end - group.begin <= kMaxRows;
  }

  void plan() {
    int64_t position = 0;
    for (const Group& group : job_.groups) {
      small_left_ += group.end > group.begin && is_small(group) ? columns_ : 0;
    }
    for (int g = 0; g < static_cast<int>(job_.groups.size()); g++) {
      const Group& group = job_.groups[g];
      int64_t rows = group.end - group.begin;
      at_.push_back(position);
      if (rows == 0) {
        continue;
      }
      if (is_small(group)) {
        small_ = true;
        plan_small(g, group);
      } else {
        position += (rows + tile_ - 1) / tile_ * packed_bytes_;
        plan_large(g, group);
      }
    }
    packed_total_ = position;
  }

  void plan_small(int g, const Group& group) {
    int64_t row_bytes = int64_t{first_.k} * first_.bits / 8 + 2 * (first_.k / first_.group) * size_of(first_.type);
    int64_t share = columns_ / (2 * int64_t{pool_threads()});
    int64_t least = std::max<int64_t>({kSmallChunkBytes / row_bytes, std::min(share, kLargeChunkBytes / row_bytes), 1});
    // Long pieces first, since each begins with a wait for memory and ends with reads ahead that another thread needed,
    // and then ever shorter ones, so that all threads end together.
    for (int64_t n = 0; n < columns_;) {
      int64_t size = std::max(small_left_ * 2 / (3 * int64_t{pool_threads()}), least);
      size = std::min(size, columns_ - n);
      pieces_.push_back({g, group.begin, group.end, static_cast<int>(n), static_cast<int>(n + size)});
      n += size;
      small_left_ -= size;
    }
  }

  void plan_large(int g, const Group& group) {
    int64_t rows = group.end - group.begin;
    int64_t panels = (columns_ + kPanel - 1) / kPanel;
    // Few panels and many threads: split the rows too, though each part unpacks the panel again.
    int64_t parts = std::max((rows + kPanelRows - 1) / kPanelRows,
                             std::min((3 * int64_t{pool_threads()} + panels - 1) / panels, rows / 64));
    if (job_.groups.size() > 1) {
      parts = (rows + kPanelRows - 1) / kPanelRows;
    }
    int64_t step = ((rows + parts - 1) / std::max<int64_t>(parts, 1) + tile_ - 1) / tile_ * tile_;
    // Rows outside: a part's packed x stays in the cache while all panels meet it.
    for (int64_t row = 0; row < rows; row += step) {
      for (int column = 0; column < columns_; column += kPanel) {
        pieces_.push_back({g, group.begin + row, group.begin + std::min(row + step, rows), column,
                           std::min(column + kPanel, columns_)});
      }
    }
  }

  // Rows of x for the small path, once each however many groups use them; tiles of the large path.
  void prepare() {
    auto x_count = static_cast<int64_t>(job_.x.offsets.size());
    int64_t small_total = small_ ? padded(x_count * prepared_bytes_, 64) : 0;
    prepared_ = static_cast<char*>(thread_scratch(1, static_cast<size_t>(small_total + packed_total_)));
    packed_ = prepared_ + small_total;
    if (small_) {
      std::vector<char> wanted(static_cast<size_t>(x_count), 0);
      for (const Group& group : job_.groups) {
        for (int64_t i = group.begin; is_small(group) && i < group.end; i++) {
          wanted[job_.x_rows[i]] = 1;
        }
      }
      for_all(x_count, x_count * depth_ < kSerialPrepare, [&](int64_t row) {
        if (wanted[row]) {
          auto* buffer = static_cast<float*>(thread_scratch(0, static_cast<size_t>(depth_) * 4));
          const float* x = row_as_f32(job_.x, row, depth_, buffer);
          (job_.fast ? kernels().prepare_fast : kernels().prepare_exact)(first_, x, prepared_ + row * prepared_bytes_);
        }
      });
    }
    if (packed_total_ == 0) {
      return;
    }
    if (job_.fast && job_.transpose && !active_isa_has_amx()) {
      find_outliers();
    }
    std::vector<std::pair<int, int64_t>> tiles;
    for (int g = 0; g < static_cast<int>(job_.groups.size()); g++) {
      const Group& group = job_.groups[g];
      for (int64_t row = group.begin; !is_small(group) && row < group.end; row += tile_) {
        tiles.emplace_back(g, row);
      }
    }
    for_all(static_cast<int64_t>(tiles.size()), false, [&](int64_t i) {
      auto [g, row] = tiles[static_cast<size_t>(i)];
      pack_tile(job_.groups[g], row, packed_ + at_[g] + (row - job_.groups[g].begin) / tile_ * packed_bytes_);
    });
  }

  // The channels with the largest |x| over all rows of the job; of equals the first.
  void find_outliers() {
    auto rows = static_cast<int64_t>(job_.x.offsets.size());
    constexpr int64_t step = 64;
    int64_t parts = (rows + step - 1) / step;
    std::vector<float> largest(static_cast<size_t>(parts * depth_), 0.0f);
    parallel_for(parts, [&](int64_t part) {
      auto* buffer = static_cast<float*>(thread_scratch(0, static_cast<size_t>(depth_) * 4));
      for (int64_t row = part * step; row < std::min(rows, (part + 1) * step); row++) {
        kernels().raise_to(row_as_f32(job_.x, row, depth_, buffer), depth_, &largest[part * depth_]);
      }
    });
    for (int64_t part = 1; part < parts; part++) {
      kernels().raise_to(&largest[part * depth_], depth_, largest.data());
    }
    std::vector<int> order(static_cast<size_t>(depth_));
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + kOutliers, order.end(), [&](int a, int b) {
      return largest[a] != largest[b] ? largest[a] > largest[b] : a < b;
    });
    std::copy(order.begin(), order.begin() + kOutliers, outliers_);
    std::sort(outliers_, outliers_ + kOutliers);
  }

  void pack_tile(const Group& group, int64_t row, void* to) {
    int count = static_cast<int>(std::min<int64_t>(tile_, group.end - row));
    auto* buffer = static_cast<float*>(thread_scratch(0, static_cast<size_t>(depth_) * 4 * count));
    const float* x[32];
    for (int i = 0; i < count; i++) {
      x[i] = row_as_f32(job_.x, job_.x_rows[row + i], depth_, buffer + static_cast<int64_t>(i) * depth_);
    }
    if (!job_.transpose) {
      kernels().pack_x_f32(first_.n, x, count, to);
    } else {
      job_.fast ? kernels().pack_x_fast(first_, x, count, outliers_, to) : kernels().pack_x_exact(first_, x, count, to);
    }
  }

  char* out_at(int64_t row, int column) const {
    return static_cast<char*>(job_.out) + (job_.out_rows[row] * columns_ + column) * size_of(job_.out_type);
  }

  void small_piece(const Piece& piece) {
    const Group& group = job_.groups[piece.group];
    int rows = static_cast<int>(piece.end - piece.begin), columns = piece.column1 - piece.column0;
    bool direct = job_.out_type == ScaleType::f32;
    auto* buffer = direct ? nullptr : static_cast<float*>(thread_scratch(0, static_cast<size_t>(rows) * columns * 4));
    const void* x[kMaxRows];
    float* out[kMaxRows];
    for (int i = 0; i < rows; i++) {
      int64_t row = piece.begin + i;
      x[i] = prepared_ + job_.x_rows[row] * prepared_bytes_;
      out[i] = direct ? reinterpret_cast<float*>(out_at(row, piece.column0)) : buffer + static_cast<int64_t>(i) * columns;
    }
    (job_.fast ? kernels().rows_fast : kernels().rows_exact)(group.w, x, rows, piece.column0, piece.column1, out);
    for (int i = 0; i < rows && !direct; i++) {
      kernels().from_f32(out[i], job_.out_type, columns, out_at(piece.begin + i, piece.column0));
    }
  }

  void large_piece(const Piece& piece) {
    const Group& group = job_.groups[piece.group];
    int rows = static_cast<int>(piece.end - piece.begin), columns = piece.column1 - piece.column0;
    // Results that are added to again and again had better be dense: rows of the result may be a power of two apart.
    bool once = depth_ <= 256 || (job_.fast && job_.transpose);
    bool direct = once && job_.out_type == ScaleType::f32 &&
        job_.out_rows[piece.end - 1] - job_.out_rows[piece.begin] == piece.end - 1 - piece.begin &&
        std::is_sorted(job_.out_rows.begin() + piece.begin, job_.out_rows.begin() + piece.end);
    int64_t scratch_bytes = padded(
        job_.transpose ? kernels().panel_scratch_bytes(first_, job_.fast) : kernels().back_scratch_bytes(first_), 64);
    int64_t tile_bytes = direct ? 0 : int64_t{rows} * kPanel * 4;
    auto* scratch = static_cast<char*>(thread_scratch(0, static_cast<size_t>(scratch_bytes + tile_bytes)));
    auto* out = direct ? reinterpret_cast<float*>(out_at(piece.begin, piece.column0))
                       : reinterpret_cast<float*>(scratch + scratch_bytes);
    int64_t stride = direct ? columns_ : kPanel;
    const char* x = packed_ + at_[piece.group] + (piece.begin - group.begin) / tile_ * packed_bytes_;
    if (job_.transpose && job_.fast) {
      kernels().panel_fast(group.w, x, rows, piece.column0, piece.column1, out, stride, outliers_, scratch);
    } else {
      auto run = job_.transpose ? kernels().panel_exact : kernels().panel_back;
      run(group.w, x, rows, piece.column0, piece.column1, out, stride, scratch);
    }
    for (int i = 0; i < rows && !direct; i++) {
      kernels().from_f32(out + i * stride, job_.out_type, columns, out_at(piece.begin + i, piece.column0));
    }
  }

  const QmmJob& job_;
  const QuantMatrix& first_;
  int columns_;
  int64_t depth_ = 0;
  int tile_ = 0;
  int64_t packed_bytes_ = 0;
  int64_t prepared_bytes_ = 0;
  int64_t packed_total_ = 0;
  bool small_ = false;
  int64_t small_left_ = 0; // columns of small groups, over all of them, that are in no piece yet
  std::vector<int64_t> at_; // where a group's tiles begin in packed_
  std::vector<Piece> pieces_;
  char* prepared_ = nullptr;
  char* packed_ = nullptr;
  int outliers_[kOutliers] = {};
};

} // namespace

void run_qmm(const QmmJob& job) {
  if (!job.groups.empty() && job.out_columns > 0) {
    Run run(job);
    run();
  }
}

void find_bias_ratio(QuantMatrix& w) {
  if (w.fp4) {
    return;
  }
  const int groups = w.k / w.group;
  const auto ratio = -static_cast<float>(1 << (w.bits - 1));
  std::vector<float> scales(static_cast<size_t>(groups)), biases(static_cast<size_t>(groups));
  for (int64_t n = 0; n < w.n; n++) {
    kernels().to_f32(static_cast<const char*>(w.scales) + n * w.scale_stride, w.type, groups, scales.data());
    kernels().to_f32(static_cast<const char*>(w.biases) + n * w.bias_stride, w.type, groups, biases.data());
    for (int g = 0; g < groups; g++) {
      if (biases[g] != ratio * scales[g]) {
        return;
      }
    }
  }
  w.bias_ratio = ratio;
}

} // namespace edger1
