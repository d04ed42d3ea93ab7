// Copies of rows for sparse convolution on a GPU, where the products themselves are torch's: the columns that the
// matrix product of one chunk of outputs reads, the way back, and the plain sums and copies of a patch.
#include "cuda/launch.h"

namespace d23 {
namespace {

constexpr int kBlock = 256;

// columns[r, k, :] = feats[table[k, first + r], :], or zeros where there is no such row. A row is `units` Units.
// blockIdx.y is the tap; neighbouring threads copy neighbouring units.
template <class Unit>
__global__ void gather_columns_kernel(const Unit* feats, const int32_t* table, Unit* columns, int64_t first,
                                      int64_t rows, int64_t num_out, int64_t taps, int64_t units) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (index >= rows * units) return;
  const int64_t r = index / units, u = index % units, k = blockIdx.y;
  const int32_t source = table[k * num_out + first + r];
  columns[(r * taps + k) * units + u] = source >= 0 ? feats[source * units + u] : Unit{};
}

// The way back where every row is named at most once: out[table[k, first + r], :] = columns[r, k, :].
template <class Unit>
__global__ void scatter_columns_kernel(const Unit* columns, const int32_t* table, Unit* out, int64_t first,
                                       int64_t rows, int64_t num_out, int64_t taps, int64_t units) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (index >= rows * units) return;
  const int64_t r = index / units, u = index % units, k = blockIdx.y;
  const int32_t target = table[k * num_out + first + r];
  if (target >= 0) out[target * units + u] = columns[(r * taps + k) * units + u];
}

// One thread a patch and channel, adding the children in the order of their slots.
template <class T>
__global__ void patch_sum_kernel(const T* feats, const int32_t* children, const T* scale, T* out, int64_t num_patches,
                                 int64_t slots, int64_t channels) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (index >= num_patches * channels) return;
  const int64_t m = index / channels, c = index % channels;
  T sum = 0;
  for (int64_t k = 0; k < slots; ++k) {
    const int32_t child = children[k * num_patches + m];
    if (child >= 0) sum += feats[child * channels + c];
  }
  out[index] = scale ? sum * scale[m] : sum;
}

template <class T>
__global__ void patch_copy_kernel(const T* feats, const int32_t* parents, const T* scale, T* out, int64_t count,
                                  int64_t channels) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (index >= count * channels) return;
  const int64_t m = parents[index / channels];
  const T value = feats[m * channels + index % channels];
  out[index] = scale ? value * scale[m] : value;
}

struct Unit16 {
  uint32_t words[4];
} __attribute__((aligned(16)));

// The widest unit that divides a row and that both tensors are aligned to.
int64_t unit_bytes(const void* from, const void* to, int64_t row_bytes) {
  const int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) | row_bytes;
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
}

template <class Unit>
int64_t copy_columns(bool scatter, const void* from, const int32_t* table, void* to, int64_t first, int64_t rows,
                     int64_t num_out, int64_t taps, int64_t row_bytes, void* stream) {
  const int64_t units = row_bytes / static_cast<int64_t>(sizeof(Unit)), blocks = num_blocks(rows * units, kBlock);
  if (blocks > kMaxBlocks) return D23_TOO_MANY;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(taps));
  const auto kernel = scatter ? scatter_columns_kernel<Unit> : gather_columns_kernel<Unit>;
  D23_LAUNCH(kernel, grid, kBlock, 0, as_stream(stream), static_cast<const Unit*>(from), table,
             static_cast<Unit*>(to), first, rows, num_out, taps, units);
  return D23_OK;
}

int64_t copy_columns(bool scatter, const void* from, const int32_t* table, void* to, int64_t first, int64_t rows,
                     int64_t num_out, int64_t taps, int64_t row_bytes, void* stream) {
  const int64_t unit = unit_bytes(from, to, row_bytes);
  const auto copy = unit == 16  ? copy_columns<Unit16>
                    : unit == 4 ? copy_columns<uint32_t>
                    : unit == 2 ? copy_columns<uint16_t>
                                : copy_columns<uint8_t>;
  return copy(scatter, from, table, to, first, rows, num_out, taps, row_bytes, stream);
}

template <class T>
int64_t patch_sum(const T* feats, const int32_t* children, const T* scale, T* out, int64_t num_patches, int64_t slots,
                  int64_t channels, void* stream) {
  const int64_t blocks = num_blocks(num_patches * channels, kBlock);
  if (blocks > kMaxBlocks) return D23_TOO_MANY;
  D23_LAUNCH(patch_sum_kernel<T>, dim3(static_cast<unsigned>(blocks)), kBlock, 0, as_stream(stream), feats, children,
             scale, out, num_patches, slots, channels);
  return D23_OK;
}

template <class T>
int64_t patch_copy(const T* feats, const int32_t* parents, const T* scale, T* out, int64_t count, int64_t channels,
                   void* stream) {
  const int64_t blocks = num_blocks(count * channels, kBlock);
  if (blocks > kMaxBlocks) return D23_TOO_MANY;
  D23_LAUNCH(patch_copy_kernel<T>, dim3(static_cast<unsigned>(blocks)), kBlock, 0, as_stream(stream), feats, parents,
             scale, out, count, channels);
  return D23_OK;
}

}  // namespace
}  // namespace d23

// feats [num_in, row], table int32 [taps, num_out], columns [rows, taps, row]; rows of row_bytes, of any dtype.
D23_EXPORT int64_t d23_gather_columns(const void* feats, const int32_t* table, void* columns, int64_t first,
                                      int64_t rows, int64_t num_out, int64_t taps, int64_t row_bytes, void* stream) {
  return d23::copy_columns(false, feats, table, columns, first, rows, num_out, taps, row_bytes, stream);
}

// columns [rows, taps, row], table int32 [taps, num_out] in which no row occurs twice, out [num_in, row].
D23_EXPORT int64_t d23_scatter_columns(const void* columns, const int32_t* table, void* out, int64_t first,
                                       int64_t rows, int64_t num_out, int64_t taps, int64_t row_bytes, void* stream) {
  return d23::copy_columns(true, columns, table, out, first, rows, num_out, taps, row_bytes, stream);
}

// As on the CPU (csrc/cpu/sparse_patch.cpp).
D23_EXPORT int64_t d23_patch_sum_f32(const float* feats, const int32_t* children, const float* scale, float* out,
                                     int64_t num_patches, int64_t slots, int64_t channels, void* stream) {
  return d23::patch_sum(feats, children, scale, out, num_patches, slots, channels, stream);
}

D23_EXPORT int64_t d23_patch_sum_f64(const double* feats, const int32_t* children, const double* scale, double* out,
                                     int64_t num_patches, int64_t slots, int64_t channels, void* stream) {
  return d23::patch_sum(feats, children, scale, out, num_patches, slots, channels, stream);
}

D23_EXPORT int64_t d23_patch_copy_f32(const float* feats, const int32_t* parents, const float* scale, float* out,
                                      int64_t count, int64_t channels, void* stream) {
  return d23::patch_copy(feats, parents, scale, out, count, channels, stream);
}

D23_EXPORT int64_t d23_patch_copy_f64(const double* feats, const int32_t* parents, const double* scale, double* out,
                                      int64_t count, int64_t channels, void* stream) {
  return d23::patch_copy(feats, parents, scale, out, count, channels, stream);
}
