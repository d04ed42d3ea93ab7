// Kernels that check the emulator itself. They are real CUDA: nvcc compiles this file too.
#include <cub/cub.cuh>

#include "cuda/launch.h"

namespace {

constexpr int kBlock = 96;

// Sum of the block's inputs through shared memory; wrong without every one of its barriers.
template <int ROUNDS, bool WITH_COUNT>
__global__ void block_sum(const float* in, float* out, int* counts, int64_t n) {
  __shared__ float parts[kBlock];
  D23_DYNAMIC_SHARED(float, copy);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  parts[threadIdx.x] = i < n ? in[i] : 0.0f;
  __syncthreads();
  for (int round = 0; round < ROUNDS; ++round) {  // rotate through shared memory
    copy[threadIdx.x] = parts[(threadIdx.x + 1) % kBlock];
    __syncthreads();
    parts[threadIdx.x] = copy[threadIdx.x];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int k = 0; k < kBlock; ++k) sum += parts[k];
    out[blockIdx.x] = sum;
  }
  if (WITH_COUNT) {
    const int count = __syncthreads_count(i < n), any = __syncthreads_or(i < n), all = __syncthreads_and(i < n);
    if (threadIdx.x == 0) counts[blockIdx.x] = count + 1000 * any + 10000 * all;
  }
}

// out [10, 64]: one warp intrinsic a row, in two warps of which the second has 20 threads.
__global__ void warp_results(const int* in, int* out) {
  const int t = threadIdx.x, lane = t % 32;
  const unsigned mask = t < 32 ? 0xffffffffu : 0x000fffffu;
  const int v = in[t];
  out[0 * 64 + t] = __shfl_sync(mask, v, 3);
  out[1 * 64 + t] = __shfl_xor_sync(mask, v, 1);
  out[2 * 64 + t] = __shfl_up_sync(mask, v, 2);
  out[3 * 64 + t] = __shfl_down_sync(mask, v, 1, 4);
  out[4 * 64 + t] = static_cast<int>(__ballot_sync(mask, v % 2));
  out[5 * 64 + t] = __any_sync(mask, v == 5);
  out[6 * 64 + t] = __all_sync(mask, v >= 0);
  out[7 * 64 + t] = static_cast<int>(__match_any_sync(mask, v % 3));
  out[8 * 64 + t] = static_cast<int>(__shfl_sync(mask, static_cast<long long>(v) << 33, 4) >> 33);
  // Two halves of a warp with masks of their own; lanes that have returned are not waited for.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  if (lane == 17) return;
  __syncwarp(half);
  out[9 * 64 + t] = static_cast<int>(__ballot_sync(half, 1));
}

__global__ void atomic_results(const int* in, int n, int* sum, int* smallest, int* largest, unsigned long long* bits,
                               int* slots) {
  const int i = (blockIdx.x * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  atomicAdd(sum, in[i]);
  atomicMin(smallest, in[i]);
  atomicMax(largest, in[i]);
  atomicOr(bits, 1ull << (in[i] & 63));
  for (int at = in[i] % n; atomicCAS(&slots[at], -1, in[i]) != -1; at = (at + 1) % n) continue;
}

// The faults that the emulator must find. Never run these on a GPU.
__global__ void skipped_barrier() {
  if (threadIdx.x != 7) __syncthreads();
  else __syncwarp(1u << 8 | 1u << 7);
}
__global__ void two_barriers(int* out) {
  if (threadIdx.x % 2) {
    __syncthreads();
    out[0] = 1;
  } else {
    __syncthreads();
    out[0] = 2;
  }
}
__global__ void wrong_mask(int* out) { out[threadIdx.x] = static_cast<int>(__ballot_sync(0xffffu, 1)); }
__global__ void unfilled_shared(float* out, bool fill) {
  __shared__ float values[32];
  if (fill) values[threadIdx.x] = 1;
  out[threadIdx.x] = values[threadIdx.x];
}
// The neighbour's value, read without a barrier.
__global__ void race(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}
__global__ void out_of_bounds(float* out, int n) { out[n + threadIdx.x] = 1; }

}  // namespace

D23_EXPORT int64_t d23_test_block_sum(const float* in, float* out, int* counts, int64_t n, void* stream) {
  D23_LAUNCH((block_sum<3, true>), d23::num_blocks(n, kBlock), kBlock, kBlock * sizeof(float), d23::as_stream(stream),
             in, out, counts, n);
  return D23_OK;
}

D23_EXPORT int64_t d23_test_warp(const int* in, int* out, void* stream) {
  D23_LAUNCH(warp_results, 1, 52, 0, d23::as_stream(stream), in, out);
  return D23_OK;
}

D23_EXPORT int64_t d23_test_atomics(const int* in, int64_t n, int* sum, int* smallest, int* largest, void* bits,
                                    int* slots, void* stream) {
  D23_LAUNCH(atomic_results, dim3(static_cast<unsigned>(d23::num_blocks(n, 64))), dim3(16, 4), 0,
             d23::as_stream(stream), in, static_cast<int>(n), sum, smallest, largest,
             static_cast<unsigned long long*>(bits), slots);
  return D23_OK;
}

D23_EXPORT int64_t d23_test_fault(int64_t which, void* out, int64_t n, void* stream) {
  const cudaStream_t s = d23::as_stream(stream);
  switch (which) {
    case 0: D23_LAUNCH(skipped_barrier, 1, 64, 0, s); break;
    case 1: D23_LAUNCH(two_barriers, 1, 64, 0, s, static_cast<int*>(out)); break;
    case 2: D23_LAUNCH(wrong_mask, 1, 64, 0, s, static_cast<int*>(out)); break;
    case 3: D23_LAUNCH(unfilled_shared, 1, 32, 0, s, static_cast<float*>(out), n < 0); break;
    case 4: D23_LAUNCH(race, 1, 64, 0, s, static_cast<int*>(out)); break;
    case 5: D23_LAUNCH(unfilled_shared, dim3(1, 70000), 32, 0, s, static_cast<float*>(out), n < 0); break;
    case 6: D23_LAUNCH(unfilled_shared, 1, 2048, 0, s, static_cast<float*>(out), n < 0); break;
    case 7: D23_LAUNCH(unfilled_shared, 1, 32, 60000, s, static_cast<float*>(out), n < 0); break;
    case 8: D23_LAUNCH(unfilled_shared, 0, 32, 0, s, static_cast<float*>(out), n < 0); break;
    default: D23_LAUNCH(out_of_bounds, 1, 32, 0, s, static_cast<float*>(out), static_cast<int>(n)); break;
  }
  return D23_OK;
}


// Sort keys with their values by the bits [begin, end), and the running sum of the sorted values.
static int64_t sort_and_scan(const int64_t* keys, const int32_t* values, int64_t* sorted_keys, int32_t* sorted_values,
                             int32_t* sums, int64_t n, int64_t begin, int64_t end, void* base, int64_t* bytes,
                             cudaStream_t stream) {
  size_t sort_bytes = 0, scan_bytes = 0;
  const int b = static_cast<int>(begin), e = static_cast<int>(end), count = static_cast<int>(n);
  D23_CUDA_TRY(cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes, keys, sorted_keys, values, sorted_values, count, b,
                                               e, stream));
  D23_CUDA_TRY(cub::DeviceScan::ExclusiveSum(nullptr, scan_bytes, sorted_values, sums, count, stream));
  d23::Scratch scratch(base);
  unsigned char* sort = scratch.take<unsigned char>(static_cast<int64_t>(sort_bytes));
  unsigned char* scan = scratch.take<unsigned char>(static_cast<int64_t>(scan_bytes));
  *bytes = scratch.bytes();
  if (base == nullptr) return D23_OK;
  D23_CUDA_TRY(cub::DeviceRadixSort::SortPairs(sort, sort_bytes, keys, sorted_keys, values, sorted_values, count, b, e,
                                               stream));
  D23_CUDA_TRY(cub::DeviceScan::ExclusiveSum(scan, scan_bytes, sorted_values, sums, count, stream));
  return D23_OK;
}

D23_EXPORT int64_t d23_test_sort_scratch_bytes(int64_t n, void* stream) {
  int64_t bytes = 0;
  const int64_t result = sort_and_scan(nullptr, nullptr, nullptr, nullptr, nullptr, n, 0, 64, nullptr, &bytes,
                                       d23::as_stream(stream));
  return result < 0 ? result : bytes;
}

D23_EXPORT int64_t d23_test_sort(const int64_t* keys, const int32_t* values, int64_t* sorted_keys,
                                 int32_t* sorted_values, int32_t* sums, int64_t n, int64_t begin, int64_t end,
                                 void* scratch, void* stream) {
  int64_t bytes = 0;
  return sort_and_scan(keys, values, sorted_keys, sorted_values, sums, n, begin, end, scratch, &bytes,
                       d23::as_stream(stream));
}
