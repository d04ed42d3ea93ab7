// Sparse convolution as matrix products over pairs of rows: out[o] = bias + Σ_k W_k · feats[table[k, o]], and the
// gradient with respect to W. Submanifold convolution, patchify (strided convolution) and its inverse are all this
// with other tables. No product is formed for a neighbour that is missing, nothing is gathered into a buffer, and a
// thread owns the outputs it adds to, in an order that depends on neither the pieces nor the number of threads.
#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/sparse_gemm.h"
#include "portable.h"

namespace d23 {
namespace {

constexpr int64_t kChunkRows = 256;         // outputs a thread works on at once; they stay in its L2 cache
constexpr int64_t kDepth = 64;              // channels of a weight panel, which stays in L1
constexpr int64_t kBlockPanels = 4;         // panels of output channels of one piece of work
constexpr int64_t kPairs = 64;              // pairs of rows, likewise in L1, that a gradient tile sums over
constexpr int64_t kGroupTaps = 9;           // taps of one piece of a gradient: the nine of equal x share rows
constexpr int64_t kWorthThreads = 1 << 16;  // numbers to copy that are worth waking another thread for

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cache-line aligned, uninitialised.
template <class T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t count) {
    const size_t bytes = divide_up(std::max<int64_t>(count, 1) * sizeof(T), 64) * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
  }
  ~AlignedBuffer() { std::free(data_); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// How W[tap][in][out] lies in memory: mirrored and transposed weights need no copy of their own.
struct WeightStrides {
  int64_t tap, in, out;
};

// Weights are kept as [Cout, taps, Cin]. `transposed` swaps the roles of Cin and Cout, `mirrored` the taps.
template <class Pointer>
WeightStrides weight_strides(Pointer& weight, int64_t taps, int64_t cin, int64_t cout, bool mirrored, bool transposed) {
  WeightStrides s = transposed ? WeightStrides{cout, taps * cout, 1} : WeightStrides{cin, 1, taps * cin};
  if (mirrored) {
    weight += (taps - 1) * s.tap;
    s.tap = -s.tap;
  }
  return s;
}

// Which input row meets which output row at a tap, in one of two forms:
//   slots == nullptr   index[tap · num_out + o] is the input row, or -1
//   slots != nullptr   output o takes part in tap slots[o] only, with input row index[o]
struct Pairs {
  const int32_t* index;
  const int32_t* slots;
  int64_t num_out;

  // Calls visit(input row, output row) for the outputs [begin, end) of a tap; the input row may be -1. `by_slot`
  // holds the same outputs in the order of their slots (see below).
  template <class Visit>
  void each(int64_t tap, int64_t begin, int64_t end, const std::vector<int64_t>& by_slot, const Visit& visit) const {
    if (slots) {
      for (int64_t i = by_slot[tap]; i < by_slot[tap + 1]; ++i) visit(index[by_slot[i]], by_slot[i]);
    } else {
      const int32_t* row = index + tap * num_out;
      for (int64_t o = begin; o < end; ++o) visit(row[o], o);
    }
  }

  // Outputs [begin, end) sorted by slot: entries 0 .. taps say where in the vector each slot's outputs start, and
  // the outputs follow. Empty where there are no slots.
  std::vector<int64_t> sort_by_slot(int64_t taps, int64_t begin, int64_t end) const {
    if (!slots) return {};
    std::vector<int64_t> sorted(taps + 2 + end - begin, 0);
    for (int64_t o = begin; o < end; ++o) ++sorted[slots[o] + 2];  // two ahead: placing advances the starts
    sorted[0] = sorted[1] = taps + 2;
    for (int64_t tap = 1; tap <= taps; ++tap) sorted[tap + 1] += sorted[tap];
    for (int64_t o = begin; o < end; ++o) sorted[sorted[slots[o] + 1]++] = o;
    return sorted;
  }
};

// How output channels are cut into vectors and panels. Few channels take half vectors: a full one would be mostly
// padding, and two half ones take no longer than a full one on the processors that pay for width.
template <class T, bool NARROW>
struct Shape {
  static constexpr int bytes = NARROW ? kVectorBytes / 2 : kVectorBytes;
  static constexpr int lanes = bytes / static_cast<int>(sizeof(T));
  static constexpr int vectors = NARROW ? 1 : kTileVectors;
  static constexpr int rows = NARROW ? kNarrowRows : kTileRows;
  static constexpr int cols = vectors * lanes;  // of a panel
  static constexpr int64_t block = NARROW ? cols : kBlockPanels * cols;
  static constexpr int64_t chunk_rows = NARROW ? 2 * kChunkRows : kChunkRows;
  static int64_t padded(int64_t channels) { return divide_up(channels, lanes) * lanes; }
};

template <class T>
bool is_narrow(int64_t channels) {
  return kVectorBytes > 16 && channels <= Shape<T, true>::lanes;
}

template <class T, bool NARROW>
struct Forward {
  using S = Shape<T, NARROW>;
  const T* feats;
  const T* bias;
  Pairs pairs;
  T* out;
  int64_t taps, cin, cout, padded;  // padded: cout rounded up to whole vectors
  const T* packed;                  // [taps][panel][cin][panel width], padded with zeros

  static void pack(const T* weight, WeightStrides s, int64_t taps, int64_t cin, int64_t cout, T* packed,
                   int64_t threads) {
    const int64_t padded = S::padded(cout);
    if (taps * padded * cin < kWorthThreads) threads = 1;
    parallel_for(taps, 1, threads, [&](int64_t tap, int64_t) {
      for (int64_t col0 = 0; col0 < padded; col0 += S::cols) {
        const int64_t width = std::min<int64_t>(S::cols, padded - col0);
        T* panel = packed + (tap * padded + col0) * cin;
        for (int64_t j = 0; j < width; ++j) {
          const T* from = weight + tap * s.tap + (col0 + j) * s.out;
          for (int64_t c = 0; c < cin; ++c) panel[c * width + j] = col0 + j < cout ? from[c * s.in] : T(0);
        }
      }
    });
  }

  // Outputs [begin, end) × columns [col0, col1).
  void piece(int64_t begin, int64_t end, int64_t col0, int64_t col1) const {
    const int64_t width = col1 - col0, rows = end - begin;
    AlignedBuffer<T> sums((rows + 1) * width);  // the last row takes what pads an incomplete tile
    for (int64_t i = 0; i <= rows; ++i) {
      for (int64_t j = 0; j < width; ++j) sums.get()[i * width + j] = bias && col0 + j < cout ? bias[col0 + j] : T(0);
    }
    const T* inputs[S::chunk_rows + S::rows];
    T* outputs[S::chunk_rows + S::rows];
    const std::vector<int64_t> by_slot = pairs.sort_by_slot(taps, begin, end);
    for (int64_t tap = 0; tap < taps; ++tap) {
      int64_t count = 0;
      pairs.each(tap, begin, end, by_slot, [&](int64_t i, int64_t o) {
        inputs[count] = feats + std::max<int64_t>(i, 0) * cin;
        outputs[count] = sums.get() + (o - begin) * width;
        count += i >= 0;
      });
      for (; count % S::rows != 0; ++count) {
        inputs[count] = inputs[count - 1];
        outputs[count] = sums.get() + rows * width;
      }
      multiply(inputs, outputs, count, packed + (tap * padded + col0) * cin, width);
    }
    const int64_t kept = std::min(col1, cout) - col0;
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(out + (begin + i) * cout + col0, sums.get() + i * width, kept * sizeof(T));
    }
  }

  void multiply(const T** inputs, T** outputs, int64_t count, const T* panels, int64_t width) const {
    for (int64_t c0 = 0; c0 < cin; c0 += kDepth) {
      const int64_t depth = std::min(kDepth, cin - c0);
      for (int64_t col = 0; col < width; col += S::cols) {
        const int64_t cols = std::min<int64_t>(S::cols, width - col);
        const T* panel = panels + col * cin + c0 * cols;
        tiles<S::vectors>(cols / S::lanes, inputs, outputs, count, panel, c0, col, depth);
      }
    }
  }

  // The tile's width is a template argument: this finds the instance for `vectors`.
  template <int VECTORS>
  static void tiles(int64_t vectors, const T** inputs, T** outputs, int64_t count, const T* panel, int64_t c0,
                    int64_t col, int64_t depth) {
    if constexpr (VECTORS > 1) {
      if (vectors < VECTORS) return tiles<VECTORS - 1>(vectors, inputs, outputs, count, panel, c0, col, depth);
    }
    for (int64_t t = 0; t < count; t += S::rows) {
      multiply_tile<T, S::bytes, S::rows, VECTORS>(inputs + t, c0, panel, outputs + t, col, depth);
    }
  }
};

template <class T, bool NARROW>
void convolve(const T* feats, const T* weight, const T* bias, Pairs pairs, T* out, int64_t taps, int64_t cin,
              int64_t cout, bool mirrored, bool transposed, int64_t threads) {
  using S = Shape<T, NARROW>;
  const int64_t padded = S::padded(cout);
  AlignedBuffer<T> packed(taps * padded * cin);
  const WeightStrides strides = weight_strides(weight, taps, cin, cout, mirrored, transposed);
  Forward<T, NARROW>::pack(weight, strides, taps, cin, cout, packed.get(), threads);
  const Forward<T, NARROW> problem{feats, bias, pairs, out, taps, cin, cout, padded, packed.get()};
  const int64_t blocks = divide_up(padded, S::block);
  // Enough pieces to keep every thread busy; the sums do not depend on it.
  const int64_t wanted = divide_up(pairs.num_out * blocks, 4 * threads);
  const int64_t chunk = std::min(S::chunk_rows, std::max<int64_t>(wanted, 8 * S::rows));
  const int64_t chunks = divide_up(pairs.num_out, chunk);
  parallel_for(chunks * blocks, 1, threads, [&](int64_t piece, int64_t) {
    const int64_t begin = piece % chunks * chunk, col0 = piece / chunks * S::block;
    problem.piece(begin, std::min(begin + chunk, pairs.num_out), col0, std::min(col0 + S::block, padded));
  });
}

// Row-major [rows, channels] whose rows are `stride` apart.
template <class T>
struct Matrix {
  const T* data;
  int64_t channels, stride;
};

// The gradient of the loss with respect to W: a sum over pairs of the products left[l][m] · right[r][n], where left
// is the matrix with fewer channels and right, whose rows are read as vectors, the other.
template <class T>
struct WeightGradient {
  using S = Shape<T, false>;
  static constexpr int64_t block = 2 * S::cols;  // right channels of one piece of work
  Matrix<T> left, right;                         // rows of `right` are padded to whole vectors
  bool left_is_output;
  Pairs pairs;
  int64_t taps, padded;

  // Adds the pairs of outputs [begin, end) for taps [tap0, tap1), left channels [m0, m1) and right channels [n0, n1)
  // to v_weight, stored as [taps][left channels][padded right channels]. Outputs are taken a chunk at a time, and all
  // taps of a chunk before the next, so that rows are read from memory once a piece and not once a tap.
  void piece(int64_t begin, int64_t end, int64_t tap0, int64_t tap1, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
             T* v_weight) const {
    const int64_t width = n1 - n0, height = m1 - m0;
    AlignedBuffer<T> sums((tap1 - tap0) * height * width);
    std::fill_n(sums.get(), (tap1 - tap0) * height * width, T(0));
    const T* a[kChunkRows];
    const T* b[kChunkRows];
    for (int64_t chunk = begin; chunk < end; chunk += kChunkRows) {
      for (int64_t tap = tap0; tap < tap1; ++tap) {
        int64_t count = 0;
        pairs.each(tap, chunk, std::min(chunk + kChunkRows, end), {}, [&](int64_t i, int64_t o) {
          const int64_t input = std::max<int64_t>(i, 0);
          a[count] = left.data + (left_is_output ? o : input) * left.stride + m0;
          b[count] = right.data + (left_is_output ? input : o) * right.stride + n0;
          count += i >= 0;
        });
        for (int64_t p = 0; p < count; p += kPairs) {
          add_pairs(a + p, b + p, std::min(kPairs, count - p), sums.get() + (tap - tap0) * height * width, height, width);
        }
      }
    }
    for (int64_t tap = tap0; tap < tap1; ++tap) {
      for (int64_t m = m0; m < m1; ++m) {
        const T* from = sums.get() + ((tap - tap0) * height + m - m0) * width;
        std::memcpy(v_weight + (tap * left.channels + m) * padded + n0, from, width * sizeof(T));
      }
    }
  }

  static void add_pairs(const T* const* a, const T* const* b, int64_t count, T* sums, int64_t height, int64_t width) {
    const int64_t tiles = divide_up(height, kTileRows);
    for (int64_t col = 0; col < width; col += S::cols) {
      const int64_t vectors = std::min<int64_t>(S::cols, width - col) / S::lanes;
      for (int64_t t = 0; t < tiles; ++t) {  // tiles of nearly equal height: 8 channels are 4 + 4, not 6 + 2
        const int64_t first = height * t / tiles, rows = height * (t + 1) / tiles - first;
        tile<kTileRows, kTileVectors>(rows, vectors, a, b, first, col, count, sums + first * width + col, width);
      }
    }
  }

  template <int ROWS, int VECTORS>
  static void tile(int64_t rows, int64_t vectors, const T* const* a, const T* const* b, int64_t a_shift,
                   int64_t b_shift, int64_t count, T* out, int64_t stride) {
    if constexpr (ROWS > 1) {
      if (rows < ROWS) return tile<ROWS - 1, VECTORS>(rows, vectors, a, b, a_shift, b_shift, count, out, stride);
    }
    if constexpr (VECTORS > 1) {
      if (vectors < VECTORS) return tile<ROWS, VECTORS - 1>(rows, vectors, a, b, a_shift, b_shift, count, out, stride);
    }
    outer_tile<T, S::bytes, ROWS, VECTORS>(a, a_shift, b, b_shift, count, out, stride);
  }
};

// A copy of `from` whose rows are padded with zeros to whole vectors.
template <class T>
Matrix<T> pad_rows(Matrix<T> from, int64_t rows, T* to, int64_t threads) {
  const Matrix<T> padded{to, from.channels, Shape<T, false>::padded(from.channels)};
  parallel_for(rows, 1024, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* row = to + i * padded.stride;
      std::memcpy(row, from.data + i * from.stride, from.channels * sizeof(T));
      std::fill(row + from.channels, row + padded.stride, T(0));
    }
  });
  return padded;
}

// Into how many runs of outputs the sum is split, each with its own partial gradient. A function of the sizes alone,
// because it decides in which order the products are added.
template <class T>
int64_t num_segments(int64_t num_out, int64_t weight_size) {
  const int64_t by_memory = (int64_t{4} << 20) / std::max<int64_t>(weight_size * sizeof(T), 1);
  return std::max<int64_t>(1, std::min({num_out / 512, by_memory, int64_t{16}}));
}

template <class T>
void weight_gradient(Matrix<T> feats, Matrix<T> v_out, Pairs pairs, T* v_weight, int64_t num_in, int64_t taps,
                     int64_t threads) {
  const int64_t cin = feats.channels, cout = v_out.channels;
  const bool swap = cout < cin;
  Matrix<T> left = swap ? v_out : feats, right = swap ? feats : v_out;
  const int64_t padded = Shape<T, false>::padded(right.channels), rows = swap ? num_in : pairs.num_out;
  AlignedBuffer<T> copy(padded == right.channels ? 0 : rows * padded);
  if (padded != right.channels) right = pad_rows(right, rows, copy.get(), threads);
  const WeightGradient<T> problem{left, right, swap, pairs, taps, padded};

  const int64_t size = taps * left.channels * padded, segments = num_segments<T>(pairs.num_out, size);
  const int64_t length = divide_up(divide_up(pairs.num_out, segments), kChunkRows) * kChunkRows;
  AlignedBuffer<T> partial(segments * size);
  const int64_t groups = divide_up(taps, kGroupTaps), heights = divide_up(left.channels, kDepth);
  const int64_t widths = divide_up(padded, problem.block);
  parallel_for(segments * groups * heights * widths, 1, threads, [&](int64_t index, int64_t) {
    const int64_t segment = index % segments, group = index / segments % groups;
    const int64_t m0 = index / (segments * groups) % heights * kDepth;
    const int64_t n0 = index / (segments * groups * heights) * problem.block;
    problem.piece(std::min(segment * length, pairs.num_out), std::min((segment + 1) * length, pairs.num_out),
                  group * kGroupTaps, std::min((group + 1) * kGroupTaps, taps), m0,
                  std::min(m0 + kDepth, left.channels), n0, std::min(n0 + problem.block, padded),
                  partial.get() + segment * size);
  });

  const WeightStrides strides = weight_strides(v_weight, taps, cin, cout, false, false);
  const int64_t left_stride = swap ? strides.out : strides.in, right_stride = swap ? strides.in : strides.out;
  parallel_for(taps * left.channels, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* sum = partial.get() + row * padded;
      for (int64_t segment = 1; segment < segments; ++segment) {
        const T* more = sum + segment * size;
        for (int64_t n = 0; n < right.channels; ++n) sum[n] += more[n];
      }
      T* to = v_weight + row / left.channels * strides.tap + row % left.channels * left_stride;
      for (int64_t n = 0; n < right.channels; ++n) to[n * right_stride] = sum[n];
    }
  });
}

template <class T>
int64_t convolve_checked(const T* feats, const T* weight, const T* bias, const int32_t* index, const int32_t* slots,
                         T* out, int64_t num_out, int64_t taps, int64_t cin, int64_t cout, int64_t mirrored,
                         int64_t transposed, int64_t threads) {
  try {
    const auto run = is_narrow<T>(cout) ? convolve<T, true> : convolve<T, false>;
    run(feats, weight, bias, Pairs{index, slots, num_out}, out, taps, cin, cout, mirrored != 0, transposed != 0, threads);
    return D23_OK;
  } catch (const std::bad_alloc&) {
    return D23_OUT_OF_MEMORY;
  }
}

template <class T>
int64_t weight_gradient_checked(const T* feats, const T* v_out, const int32_t* table, T* v_weight, int64_t num_in,
                                int64_t num_out, int64_t taps, int64_t cin, int64_t cout, int64_t threads) {
  try {
    weight_gradient(Matrix<T>{feats, cin, cin}, Matrix<T>{v_out, cout, cout}, Pairs{table, nullptr, num_out}, v_weight,
                    num_in, taps, threads);
    return D23_OK;
  } catch (const std::bad_alloc&) {
    return D23_OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace d23

// feats [num_in, cin], weight [cout, taps, cin] ([cin, taps, cout] if transposed), bias [cout] or null,
// index/slots as in Pairs, out [num_out, cout].
D23_EXPORT int64_t d23_sparse_conv_f32(const float* feats, const float* weight, const float* bias,
                                       const int32_t* index, const int32_t* slots, float* out, int64_t num_out,
                                       int64_t taps, int64_t cin, int64_t cout, int64_t mirrored, int64_t transposed,
                                       int64_t num_threads) {
  return d23::convolve_checked(feats, weight, bias, index, slots, out, num_out, taps, cin, cout, mirrored, transposed,
                               num_threads);
}

D23_EXPORT int64_t d23_sparse_conv_f64(const double* feats, const double* weight, const double* bias,
                                       const int32_t* index, const int32_t* slots, double* out, int64_t num_out,
                                       int64_t taps, int64_t cin, int64_t cout, int64_t mirrored, int64_t transposed,
                                       int64_t num_threads) {
  return d23::convolve_checked(feats, weight, bias, index, slots, out, num_out, taps, cin, cout, mirrored, transposed,
                               num_threads);
}

// feats [num_in, cin], v_out [num_out, cout], table [taps, num_out], v_weight [cout, taps, cin].
D23_EXPORT int64_t d23_sparse_conv_weight_grad_f32(const float* feats, const float* v_out, const int32_t* table,
                                                   float* v_weight, int64_t num_in, int64_t num_out, int64_t taps,
                                                   int64_t cin, int64_t cout, int64_t num_threads) {
  return d23::weight_gradient_checked(feats, v_out, table, v_weight, num_in, num_out, taps, cin, cout, num_threads);
}

D23_EXPORT int64_t d23_sparse_conv_weight_grad_f64(const double* feats, const double* v_out, const int32_t* table,
                                                   double* v_weight, int64_t num_in, int64_t num_out, int64_t taps,
                                                   int64_t cin, int64_t cout, int64_t num_threads) {
  return d23::weight_gradient_checked(feats, v_out, table, v_weight, num_in, num_out, taps, cin, cout, num_threads);
}
