// Register tiles of the sparse matrix products. Rows are given by pointers, so gathering and scattering cost no
// copies: a tile reads the input rows and adds to the output rows where they lie.
#pragma once

#include <cstdint>
#include <cstring>

namespace d23 {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

// A tile of sums takes three quarters of the registers: 6 rows of 4 vectors, or of 2 where registers are few.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kRegisters * 3 / 4 / kTileRows;
// Narrow outputs (8 channels): one vector a row, and enough rows to hide the latency of the multiply-adds.
constexpr int kNarrowRows = 8;

template <class T, int BYTES>
struct VectorOf;
template <int BYTES>
struct VectorOf<float, BYTES> {
  typedef float type __attribute__((vector_size(BYTES)));
};
template <int BYTES>
struct VectorOf<double, BYTES> {
  typedef double type __attribute__((vector_size(BYTES)));
};
template <class T, int BYTES>
using Vector = typename VectorOf<T, BYTES>::type;

template <class V, class T>
inline __attribute__((always_inline)) V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class V, class T>
inline __attribute__((always_inline)) void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof(v));
}

// Loops over a tile must be unrolled early, or the compiler keeps the sums in memory as well as in registers.
#define D23_UNROLL _Pragma("GCC unroll 8")

// out[r][0 .. VECTORS vectors) += Σ_c in[r][c] · panel[c][·], for ROWS rows and `depth` channels, where the rows start
// at inputs[r] + in_shift and outputs[r] + out_shift. The sum is formed from zero and added at the end: shorter chains
// of roundings, and the outputs are not waited for. Not inlined, so that all row pointers find a register.
template <class T, int BYTES, int ROWS, int VECTORS>
__attribute__((noinline)) void multiply_tile(const T* const* inputs, int64_t in_shift, const T* panel, T* const* outputs,
                                             int64_t out_shift, int64_t depth) {
  using V = Vector<T, BYTES>;
  constexpr int W = BYTES / static_cast<int>(sizeof(T));
  const T* in[ROWS];
  D23_UNROLL for (int r = 0; r < ROWS; ++r) in[r] = inputs[r] + in_shift;
  V sum[ROWS][VECTORS];
  D23_UNROLL for (int r = 0; r < ROWS; ++r) {
    D23_UNROLL for (int v = 0; v < VECTORS; ++v) sum[r][v] = V{};
  }
  for (int64_t c = 0; c < depth; ++c) {
    V b[VECTORS];
    D23_UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = load<V>(panel + (c * VECTORS + v) * W);
    D23_UNROLL for (int r = 0; r < ROWS; ++r) {
      D23_UNROLL for (int v = 0; v < VECTORS; ++v) sum[r][v] += in[r][c] * b[v];
    }
  }
  D23_UNROLL for (int r = 0; r < ROWS; ++r) {
    T* out = outputs[r] + out_shift;
    D23_UNROLL for (int v = 0; v < VECTORS; ++v) store(out + v * W, load<V>(out + v * W) + sum[r][v]);
  }
}

// out[m][·] += Σ_p left[p][m] · right[p][·] over `count` pairs of rows: a tile of the gradient of a weight.
template <class T, int BYTES, int ROWS, int VECTORS>
inline __attribute__((always_inline)) void outer_tile(const T* const* left, int64_t left_shift, const T* const* right,
                                          int64_t right_shift, int64_t count, T* out, int64_t out_stride) {
  using V = Vector<T, BYTES>;
  constexpr int W = BYTES / static_cast<int>(sizeof(T));
  V sum[ROWS][VECTORS];
  D23_UNROLL for (int r = 0; r < ROWS; ++r) {
    D23_UNROLL for (int v = 0; v < VECTORS; ++v) sum[r][v] = V{};
  }
  for (int64_t p = 0; p < count; ++p) {
    const T* a = left[p] + left_shift;
    const T* b_row = right[p] + right_shift;
    V b[VECTORS];
    D23_UNROLL for (int v = 0; v < VECTORS; ++v) b[v] = load<V>(b_row + v * W);
    D23_UNROLL for (int r = 0; r < ROWS; ++r) {
      D23_UNROLL for (int v = 0; v < VECTORS; ++v) sum[r][v] += a[r] * b[v];
    }
  }
  D23_UNROLL for (int r = 0; r < ROWS; ++r) {
    D23_UNROLL for (int v = 0; v < VECTORS; ++v) {
      T* to = out + r * out_stride + v * W;
      store(to, load<V>(to) + sum[r][v]);
    }
  }
}

}  // namespace d23
