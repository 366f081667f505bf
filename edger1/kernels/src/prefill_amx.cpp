// Attention and gates of a prompt in bf16 tiles: queries, keys, weights of attention and values are rounded to bf16 and
// added up in f32, maxima and sums of the softmax are f32.
#include "prefill_tiles.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "amx_panel.h"

namespace edger1 {
namespace {

constexpr int kBlockKeys = 256;
constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

// Of our own: the linker may take any source's copy of a function of the standard library, and this one's would have
// instructions that other processors lack.
template <class T>
inline T lesser(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T greater(T a, T b) {
  return a < b ? b : a;
}
inline void fill(float* x, float value, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    x[i] = value;
  }
}

// 2^x to about 2e-6; 0 far below, infinity far above.
inline __m512 exp2(__m512 x) {
  __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// x / (1 + e^-x)
inline __m512 silu(__m512 x) {
  // 1 + 2^126 still has a reciprocal.
  __m512 power = _mm512_min_ps(_mm512_set1_ps(126.0f), _mm512_mul_ps(x, _mm512_set1_ps(-kLog2E)));
  __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), exp2(power));
  __m512 inverse = _mm512_rcp14_ps(d);
  inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(d, inverse, _mm512_set1_ps(2.0f)));
  return _mm512_mul_ps(x, inverse);
}

inline __m512 load_bias(const float* bias, int from, int n) {
  return bias ? _mm512_maskz_loadu_ps(first16(greater(n - from, 0)), bias + from) : _mm512_setzero_ps();
}

void product_add(const QuantMatrix& w, const float* bias, const void* packed_x, int m, int n0, int n1, const float* base,
                 float factor, float* out, int64_t stride, void* scratch) {
  const int n = n1 - n0;
  const __mmask16 masks[2] = {first16(n), first16(greater(n - 16, 0))};
  const __m512 biases[2] = {load_bias(bias ? bias + n0 : nullptr, 0, n), load_bias(bias ? bias + n0 : nullptr, 16, n)};
  const __m512 times = _mm512_set1_ps(factor);
  TilePanel(w, n0, n1, scratch).multiply(packed_x, m, [&](int row, int count, const float* sums) {
    for (int i = 0; i < count; i++) {
      for (int half = 0; half < 2; half++) {
        int64_t at = (row + i) * stride + half * 16;
        __m512 found = _mm512_add_ps(_mm512_load_ps(sums + i * kPanel + half * 16), biases[half]);
        found = _mm512_fmadd_ps(found, times, _mm512_maskz_loadu_ps(masks[half], base + at));
        _mm512_mask_storeu_ps(out + at, masks[half], found);
      }
    }
  }, [&](int row) {
    for (int i = 0; i < kTileRows; i++) {
      for (int half = 0; half < 2; half++) {
        int64_t at = (row + i) * stride + half * 16;
        _mm_prefetch(out + at, _MM_HINT_ET0);
        _mm_prefetch(base + at, _MM_HINT_T0);
      }
    }
  });
}

void product_gate(const QuantMatrix& w, const float* bias, const void* packed_x, int m, int n0, int n1, Gate activation,
                  const float* gates, void* packed, int64_t tile_bytes, void* scratch) {
  const __m512 biases[2] = {load_bias(bias ? bias + n0 : nullptr, 0, n1 - n0),
                            load_bias(bias ? bias + n0 : nullptr, 16, n1 - n0)};
  TilePanel(w, n0, n1, scratch).multiply(packed_x, m, [&](int row, int count, const float* sums) {
    char* to = static_cast<char*>(packed) + row / kTileRows * tile_bytes + n0 / 32 * 2048;
    alignas(64) float buffer[kTileRows * kPanel];
    const float* own = gates + int64_t{row} * kPanel;
    if (activation != Gate::swiglu) {
      fill(buffer, 1.0f, count * kPanel);
      ops().gate(activation, buffer, own, buffer, count * kPanel, 0, 0);
      own = buffer;
    }
    for (int i = 0; i < count; i++) {
      __m512 v[2];
      for (int half = 0; half < 2; half++) {
        __m512 g = _mm512_load_ps(own + i * kPanel + half * 16);
        __m512 up = _mm512_add_ps(_mm512_load_ps(sums + i * kPanel + half * 16), biases[half]);
        v[half] = _mm512_mul_ps(activation == Gate::swiglu ? silu(g) : g, up);
      }
      _mm512_store_si512(to + i * 64, to_bf16(v[0], v[1]));
    }
  }, [](int) {});
}

int slice_length(int group) {
  return lesser(greater(256 / group / kTileRows * kTileRows, kTileRows), 256);
}

// Working memory of a slice. Blocks are 32 positions of one head; dimensions are padded to whole tiles.
struct Layout {
  int steps, blocks_a_head, blocks;
  int64_t queries, keys, values, weights, scores, out, tops, sums, bytes;

  Layout(int group, int length, int dim)
      : steps((dim + 31) / 32), blocks_a_head((length + kTileRows - 1) / kTileRows), blocks(group * blocks_a_head) {
    int64_t at = 0;
    auto take = [&](int64_t n) {
      int64_t begin = at;
      at += padded(n, 64);
      return begin;
    };
    queries = take(int64_t{blocks} * steps * 2048);
    keys = take(int64_t{kBlockKeys} * steps * 64);
    values = take(int64_t{kBlockKeys} * steps * 64);
    weights = take(int64_t{kBlockKeys} * 64);
    scores = take(int64_t{kBlockKeys} * kTileRows * 4);
    out = take(int64_t{blocks} * kTileRows * steps * 128);
    tops = take(int64_t{blocks} * kTileRows * 4);
    sums = take(int64_t{blocks} * kTileRows * 4);
    bytes = at;
  }
};

int64_t slice_bytes(int group, int length, int dim) {
  return Layout(group, length, dim).bytes;
}

inline __m512 load_part(const float* x, int from, int dim) {
  return _mm512_maskz_loadu_ps(first16(greater(dim - from, 0)), x + from);
}

inline __m512i load_bf16(const float* x, int from, int dim) {
  return to_bf16(load_part(x, from, dim), load_part(x, from + 16, dim));
}

// [dim / 32][32 rows][32]
void pack_queries(const float* x, int rows, int dim, uint16_t* to) {
  for (int d = 0; d < dim; d += 32) {
    for (int i = 0; i < kTileRows; i++) {
      _mm512_store_si512(to + d * 32 + i * 32, i < rows ? load_bf16(x + int64_t{i} * dim, d, dim) : _mm512_setzero_si512());
    }
  }
}

// Each 32 keys: [dim / 32][2 halves][16 pairs of dimensions][16 keys][2]
void pack_keys(const float* keys, int count, int dim, int steps, uint16_t* to) {
  for (int key = 0; key < count; key += 16) {
    uint16_t* group = to + key / 32 * steps * 1024 + key % 32 / 16 * 512;
    for (int d = 0; d < dim; d += 32) {
      __m512i row[16];
      for (int i = 0; i < 16; i++) {
        row[i] = key + i < count ? load_bf16(keys + int64_t{key + i} * dim, d, dim) : _mm512_setzero_si512();
      }
      transpose16(row);
      for (int i = 0; i < 16; i++) {
        _mm512_store_si512(group + d * 32 + i * 32, row[i]);
      }
    }
  }
}

// Each 32 dimensions: [keys / 32][2 halves][16 pairs of keys][16 dimensions][2]; `stride` elements lead to the next.
void pack_values(const float* values, int count, int dim, int64_t stride, uint16_t* to) {
  const Pairing pairing;
  for (int key = 0; key < (count + 31) / 32 * 32; key += 2) {
    for (int d = 0; d < dim; d += 16) {
      const float* from = values + int64_t{key} * dim;
      __m512 even = key < count ? load_part(from, d, dim) : _mm512_setzero_ps();
      __m512 odd = key + 1 < count ? load_part(from + dim, d, dim) : _mm512_setzero_ps();
      _mm512_store_si512(to + d / 32 * stride + key / 32 * 1024 + d % 32 / 16 * 512 + key % 32 * 16, pairing(even, odd));
    }
    if (dim % 32 != 0 && dim % 32 <= 16) {
      _mm512_store_si512(to + dim / 32 * stride + key / 32 * 1024 + 512 + key % 32 * 16, _mm512_setzero_si512());
    }
  }
}

// One row of scores becomes weights in bf16, [seen / 32][row of 32][32]; returns what earlier sums are to be multiplied by.
inline float soften(const float* scores, int seen, int columns, float scale, float& top, float& sum, uint16_t* weights) {
  __m512 largest = _mm512_set1_ps(kMinusInfinity);
  for (int j = 0; j < seen; j += 16) {
    largest = _mm512_mask_max_ps(largest, first16(seen - j), largest, _mm512_load_ps(scores + j));
  }
  float best = greater(top, _mm512_reduce_max_ps(largest) * scale);
  __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(-best), total = _mm512_setzero_ps();
  for (int j = 0; j < columns; j += 32) {
    __m512 low = exp2(_mm512_fmadd_ps(_mm512_load_ps(scores + j), factor, shift));
    __m512 high = exp2(_mm512_fmadd_ps(_mm512_load_ps(scores + j + 16), factor, shift));
    low = _mm512_maskz_mov_ps(first16(greater(seen - j, 0)), low);
    high = _mm512_maskz_mov_ps(first16(greater(seen - j - 16, 0)), high);
    total = _mm512_add_ps(total, _mm512_add_ps(low, high));
    _mm512_store_si512(weights + j * 32, to_bf16(low, high));
  }
  float before = top == kMinusInfinity ? 0.0f : _mm512_cvtss_f32(exp2(_mm512_set1_ps(top - best)));
  sum = sum * before + _mm512_reduce_add_ps(total);
  top = best;
  return before;
}

inline void rescale(float* x, float factor, int n) {
  for (int j = 0; j < n; j += 16) {
    _mm512_store_ps(x + j, _mm512_mul_ps(_mm512_load_ps(x + j), _mm512_set1_ps(factor)));
  }
}

void attend(const AttentionSlice& slice, void* scratch) {
  const Layout at(slice.group, slice.length, slice.dim);
  auto* memory = static_cast<char*>(scratch);
  auto* queries = reinterpret_cast<uint16_t*>(memory + at.queries);
  auto* keys = reinterpret_cast<uint16_t*>(memory + at.keys);
  auto* values = reinterpret_cast<uint16_t*>(memory + at.values);
  auto* weights = reinterpret_cast<uint16_t*>(memory + at.weights);
  auto* scores = reinterpret_cast<float*>(memory + at.scores);
  auto* out = reinterpret_cast<float*>(memory + at.out);
  auto* tops = reinterpret_cast<float*>(memory + at.tops);
  auto* sums = reinterpret_cast<float*>(memory + at.sums);
  const int width = at.steps * 32, dim = slice.dim, steps = at.steps;
  const float scale = slice.scale * kLog2E;
  for (int block = 0; block < at.blocks; block++) {
    int begin = block % at.blocks_a_head * kTileRows;
    pack_queries(slice.queries + block / at.blocks_a_head * slice.head_stride + int64_t{begin} * dim,
                 lesser(slice.length - begin, kTileRows), dim, queries + int64_t{block} * steps * 1024);
  }
  fill(out, 0.0f, int64_t{at.blocks} * kTileRows * width);
  fill(tops, kMinusInfinity, int64_t{at.blocks} * kTileRows);
  fill(sums, 0.0f, int64_t{at.blocks} * kTileRows);
  _tile_loadconfig(&kTileShapes);
  const int end = slice.first + slice.length;
  for (int key = 0; key < end; key += kBlockKeys) {
    const int count = lesser(kBlockKeys, end - key);
    pack_keys(slice.keys + int64_t{key} * dim, count, dim, steps, keys);
    pack_values(slice.values + int64_t{key} * dim, count, dim, kBlockKeys * 32, values);
    for (int block = 0; block < at.blocks; block++) {
      int begin = block % at.blocks_a_head * kTileRows, rows = lesser(slice.length - begin, kTileRows);
      // Row i sees keys up to its own position.
      int first_seen = slice.first + begin + 1 - key, columns = (lesser(first_seen + rows - 1, count) + 31) / 32 * 32;
      if (columns <= 0) {
        continue;
      }
      // GCC 12 does not know that tile loads read memory.
      __asm__ volatile("" ::: "memory");
      for (int j = 0; j < columns; j += 32) {
        zero_sums();
        add_products(queries + int64_t{block} * steps * 1024, keys + j * steps * 32, steps);
        store_sums(scores + j, kBlockKeys);
      }
      __asm__ volatile("" ::: "memory");
      float* sums_of_block = out + int64_t{block} * kTileRows * width;
      for (int i = 0; i < kTileRows; i++) {
        int seen = i < rows ? lesser(greater(first_seen + i, 0), count) : 0, row = block * kTileRows + i;
        if (seen == 0) {
          for (int j = 0; j < columns; j += 32) {
            _mm512_store_si512(weights + j * 32 + i * 32, _mm512_setzero_si512());
          }
          continue;
        }
        float before = soften(scores + i * kBlockKeys, seen, columns, scale, tops[row], sums[row], weights + i * 32);
        if (before != 1.0f && key > 0) {
          rescale(sums_of_block + i * width, before, width);
        }
      }
      __asm__ volatile("" ::: "memory");
      for (int d = 0; d < width; d += 32) {
        load_sums(sums_of_block + d, width);
        add_products(weights, values + d / 32 * kBlockKeys * 32, columns / 32);
        store_sums(sums_of_block + d, width);
      }
    }
  }
  _tile_release();
  for (int block = 0; block < at.blocks; block++) {
    int begin = block % at.blocks_a_head * kTileRows;
    for (int i = 0; i < lesser(slice.length - begin, kTileRows); i++) {
      const float* from = out + (int64_t{block} * kTileRows + i) * width;
      float* to = slice.out + int64_t{begin + i} * slice.out_stride + block / at.blocks_a_head * dim;
      __m512 inverse = _mm512_set1_ps(1.0f / sums[block * kTileRows + i]);
      for (int j = 0; j < dim; j += 16) {
        _mm512_mask_storeu_ps(to + j, first16(dim - j), _mm512_mul_ps(_mm512_load_ps(from + j), inverse));
      }
    }
  }
}

const TileOps kOps{slice_length, slice_bytes, attend, product_add, product_gate};

} // namespace

const TileOps* tile_ops() {
  return &kOps;
}

} // namespace edger1
#else
namespace edger1 {
const TileOps* tile_ops() {
  return nullptr;
}
} // namespace edger1
#endif
