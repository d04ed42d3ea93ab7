// Neighbour tables and patch tables from sorted keys; the searches are those of sparse_keys.h, which the CPU shares.
// Sorting itself is torch's. `status` is as on the CPU: the first row that does not fit, the first that repeats.
#include "cuda/launch.h"
#include "sparse_keys.h"

namespace d23 {
namespace {

constexpr int kBlock = 256;

__device__ void report_row(int64_t* status, int64_t row) {
  atomicMin(reinterpret_cast<unsigned long long*>(status), static_cast<unsigned long long>(row));
}

__global__ void voxel_keys_kernel(const int32_t* coords, int64_t* keys, int64_t* status, int64_t count, int64_t patch) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= count) return;
  const bool fits = coord_fits(coords + 4 * i);
  if (!fits) report_row(status, i);
  keys[i] = fits ? patch_key(coords + 4 * i, patch) : 0;
}

// One thread a voxel and a run of offsets that differ in z only; blockIdx.y is the run's first offset.
__global__ void neighbor_table_kernel(const int64_t* keys, const int32_t* order, const int32_t* offsets,
                                      int32_t* table, int64_t* status, int64_t count, int32_t taps) {
  const int32_t first = static_cast<int32_t>(blockIdx.y);
  const int32_t dx = offsets[3 * first], dy = offsets[3 * first + 1];
  if (first > 0 && offsets[3 * first - 3] == dx && offsets[3 * first - 2] == dy) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= count) return;
  if (first == 0 && i > 0 && keys[i] == keys[i - 1]) {
    report_row(status + 1, order[i] > order[i - 1] ? order[i] : order[i - 1]);
  }
  const int64_t start = keys[i] + key_step(dx, dy, offsets[3 * first + 2]);
  int64_t position = lower_bound_key(keys, 0, count, start);
  for (int32_t k = first; k < taps && offsets[3 * k] == dx && offsets[3 * k + 1] == dy; ++k) {
    const int64_t target = keys[i] + key_step(dx, dy, offsets[3 * k + 2]);
    table[k * count + order[i]] = match_key(keys, order, count, target, position);
  }
}

__global__ void patch_tables_kernel(const int32_t* coords, const int32_t* order, const int32_t* group,
                                    int32_t* patch_coords, int32_t* children, int32_t* parents, int32_t* slots,
                                    int64_t* status, int64_t count, int64_t num_patches, int32_t patch) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= count) return;
  const int32_t row = order[i], m = group[i];
  const int32_t* coord = coords + 4 * static_cast<int64_t>(row);
  const int32_t slot = patch_slot(coord, patch);
  parents[row] = m;
  slots[row] = slot;
  // Two voxels at one place exchange the entry in some order; the input is refused, so which one stays is no matter.
  const int32_t other = atomicExch(&children[slot * num_patches + m], row);
  if (other >= 0) report_row(status + 1, other > row ? other : row);
  if (i == 0 || group[i - 1] != m) {
    patch_coords[4 * m] = coord[0];
    for (int axis = 1; axis < 4; ++axis) patch_coords[4 * m + axis] = coord[axis] / patch;
  }
}

}  // namespace
}  // namespace d23

D23_EXPORT int64_t d23_voxel_keys(const int32_t* coords, int64_t* keys, int64_t* status, int64_t count, int64_t patch,
                                  void* stream) {
  const dim3 grid(static_cast<unsigned>(d23::num_blocks(count, d23::kBlock)));
  D23_LAUNCH(d23::voxel_keys_kernel, grid, d23::kBlock, 0, d23::as_stream(stream), coords, keys, status, count, patch);
  return D23_OK;
}

D23_EXPORT int64_t d23_neighbor_table(const int64_t* keys, const int32_t* order, const int32_t* offsets,
                                      int32_t* table, int64_t* status, int64_t count, int64_t taps, void* stream) {
  const dim3 grid(static_cast<unsigned>(d23::num_blocks(count, d23::kBlock)), static_cast<unsigned>(taps));
  D23_LAUNCH(d23::neighbor_table_kernel, grid, d23::kBlock, 0, d23::as_stream(stream), keys, order, offsets, table,
             status, count, static_cast<int32_t>(taps));
  return D23_OK;
}

D23_EXPORT int64_t d23_patch_tables(const int32_t* coords, const int32_t* order, const int32_t* group,
                                    int32_t* patch_coords, int32_t* children, int32_t* parents, int32_t* slots,
                                    int64_t* status, int64_t count, int64_t num_patches, int64_t patch, void* stream) {
  const dim3 grid(static_cast<unsigned>(d23::num_blocks(count, d23::kBlock)));
  D23_LAUNCH(d23::patch_tables_kernel, grid, d23::kBlock, 0, d23::as_stream(stream), coords, order, group,
             patch_coords, children, parents, slots, status, count, num_patches, static_cast<int32_t>(patch));
  return D23_OK;
}
