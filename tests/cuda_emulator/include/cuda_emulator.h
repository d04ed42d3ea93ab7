// Runs CUDA kernels on the CPU, for tests on machines without a GPU. A block's threads are fibers on one OS thread;
// barriers and warp intrinsics switch between them and exchange what they must, so that their semantics are real:
//
//   - a thread that skips a barrier or a warp intrinsic that others wait at is found, not waited for for ever;
//   - threads run in an order that a seed decides, so that code which needs no particular order gives one result;
//   - static and dynamic shared memory starts as 0xff bytes (NaN, −1) in every block.
//
// Not modelled: the memory hierarchy, anything asynchronous, warps in lockstep (threads of a warp run one after the
// other between two synchronising operations, as the Volta memory model allows).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace d23_emulator {

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024, kMaxGridYZ = 65535, kMaxGridX = 0x7fffffff;
constexpr size_t kDefaultShared = 48 * 1024, kMaxShared = 227 * 1024;

// A call without ownership: what a fiber runs.
struct Body {
  void (*call)(void*);
  void* data;
};

cudaError_t run_grid(const char* kernel, const void* function, dim3 grid, dim3 block, size_t shared_bytes, Body body);
cudaError_t allow_shared(const void* function, size_t bytes);
const char* error_text(cudaError_t error);
void* dynamic_shared();

enum class BlockOp { kSync, kCount, kAnd, kOr };
// Wait until every thread of the block that has not returned is at this barrier; the combined predicates.
int block_barrier(BlockOp op, int predicate, const char* file, int line);

enum class WarpOp { kSync, kShuffle, kBallot, kMatch, kAdd, kMin, kMax, kAnd, kOr, kXor };
// Wait until every lane of `mask` that has not returned is here with the same operation and mask; its result.
// kShuffle: the value of lane `source`. Values of lanes that do not take part are undefined: 0xdeadbeefdeadbeef.
uint64_t warp_exchange(WarpOp op, unsigned mask, uint64_t value, int source);
unsigned active_lanes();
int lane();

// Let other threads run first, sometimes: called by atomics, whose order a kernel must not depend on.
void maybe_yield();

// A launch that waits for its arguments; they are converted and copied once.
template <class... P>
struct Launch {
  const char* name;
  void (*kernel)(P...);
  dim3 grid, block;
  size_t shared_bytes;

  cudaError_t operator()(P... args) const {
    struct Call {
      void (*kernel)(P...);
      std::tuple<std::decay_t<P>...> arguments;
    } call{kernel, std::tuple<std::decay_t<P>...>(args...)};
    const Body body = {[](void* data) {
                         const Call& c = *static_cast<Call*>(data);
                         std::apply(c.kernel, c.arguments);
                       },
                       &call};
    return run_grid(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, body);
  }
};

template <class... P>
Launch<P...> launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t) {
  return {name, kernel, grid, block, shared_bytes};
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "warp intrinsics take 32-bit and 64-bit values");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace d23_emulator
