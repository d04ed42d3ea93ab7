// Conventions every CUDA source follows. They also let the sources run without a GPU: compiled as plain C++ with
// D23_EMULATE defined and tests/cuda_emulator/include first on the include path, the same code runs on the CPU.
//
//   - Kernels are launched with D23_LAUNCH and dynamic shared memory is declared with D23_DYNAMIC_SHARED, never with
//     the <<< >>> syntax or `extern __shared__`. Static `__shared__` arrays need nothing special.
//   - Exported functions return int64_t, take the stream (a void*) as their last argument, and never allocate device
//     memory: Python passes one scratch tensor whose size came from the matching d23_..._scratch_bytes function.
//   - Warp intrinsics are the _sync ones, with a mask that names exactly the lanes that take part.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "portable.h"

namespace d23 {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// What went wrong last on this host thread; d23_cuda_error_text (launch.cu) hands it to Python.
inline thread_local cudaError_t last_cuda_error = cudaSuccess;

inline bool failed(cudaError_t status) {
  if (status != cudaSuccess) last_cuda_error = status;
  return status != cudaSuccess;
}

// A launch without blocks or threads is an error to CUDA and simply nothing to do here.
inline bool is_empty(dim3 grid, dim3 block) {
  return grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0;
}

// Blocks of `block_size` that cover `count` items.
inline int64_t num_blocks(int64_t count, int64_t block_size) { return (count + block_size - 1) / block_size; }

// Largest number of blocks along x; a count above it is D23_TOO_MANY.
constexpr int64_t kMaxBlocks = 0x7fffffff;

inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

// Cuts one buffer into aligned pieces. Without a buffer it only counts, so that a function
//
//     struct Buffers { Key* keys; int32_t* values; };
//     Buffers lay_out(Scratch& scratch, int64_t n) { return {scratch.take<Key>(n), scratch.take<int32_t>(n)}; }
//
// serves both the size query (Scratch s; lay_out(s, n); return s.bytes();) and the launch (Scratch s(pointer)).
class Scratch {
 public:
  static constexpr int64_t kAlignment = 256;

  Scratch() = default;
  explicit Scratch(void* base) : base_(static_cast<unsigned char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  int64_t bytes() const { return used_; }

 private:
  unsigned char* base_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace d23

// Return D23_CUDA_ERROR from the surrounding function (which returns int64_t) if a CUDA runtime or cub call fails.
#define D23_CUDA_TRY(...)                               \
  do {                                                  \
    if (d23::failed(__VA_ARGS__)) return D23_CUDA_ERROR; \
  } while (0)

// D23_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, arguments...): launch, and return D23_CUDA_ERROR from
// the surrounding function if the launch is refused. Put a kernel with several template arguments in parentheses:
//
//     D23_LAUNCH((blend_forward<3, true>), dim3(tiles_x, tiles_y), 256, 0, stream, means, colors, out);
//
// An empty grid or block launches nothing. (Errors inside a running kernel surface at the next synchronisation.)
#if defined(D23_EMULATE)
#define D23_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                   \
  do {                                                                                                               \
    const dim3 d23_grid(grid), d23_block(block);                                                                     \
    if (!d23::is_empty(d23_grid, d23_block))                                                                         \
      D23_CUDA_TRY(d23_emulator::launch(#kernel, kernel, d23_grid, d23_block, shared_bytes, stream)(__VA_ARGS__));   \
  } while (0)
#define D23_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(d23_emulator::dynamic_shared())
#else
#define D23_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                       \
  do {                                                                                   \
    const dim3 d23_grid(grid), d23_block(block);                                         \
    if (!d23::is_empty(d23_grid, d23_block)) {                                           \
      (kernel)<<<d23_grid, d23_block, shared_bytes, stream>>>(__VA_ARGS__);              \
      D23_CUDA_TRY(cudaGetLastError());                                                  \
    }                                                                                    \
  } while (0)
#define D23_DYNAMIC_SHARED(type, name)                                          \
  extern __shared__ __align__(16) unsigned char d23_dynamic_shared_bytes[];     \
  type* const name = reinterpret_cast<type*>(d23_dynamic_shared_bytes)
#endif
