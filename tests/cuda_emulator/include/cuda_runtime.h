// Stands in for CUDA's header when the kernels are compiled for the emulator: the part of CUDA C++ that they use.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cuda_emulator.h"

#define __global__ static
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Thread-local variables lie together, so that the emulator can fill them before each block; ordinary ones get guarded
// ends from AddressSanitizer. Either way a block has one copy, because its threads share one OS thread.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

// ---- types and the built-in variables ----

struct uint3 {
  unsigned x, y, z;
};

#define D23_VECTOR_TYPES(scalar, name)                                                                    \
  struct name##2 { scalar x, y; };                                                                        \
  struct name##4 { scalar x, y, z, w; };                                                                  \
  struct name##3 { scalar x, y, z; };                                                                     \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                                    \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }                       \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
D23_VECTOR_TYPES(float, float)
D23_VECTOR_TYPES(double, double)
D23_VECTOR_TYPES(int, int)
D23_VECTOR_TYPES(short, short)
#undef D23_VECTOR_TYPES

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = d23_emulator::kWarp;

// ---- synchronisation ----

#define D23_BARRIER(op, predicate) d23_emulator::block_barrier(d23_emulator::BlockOp::op, predicate, __FILE__, __LINE__)
#define __syncthreads() ((void)D23_BARRIER(kSync, 0))
#define __syncthreads_count(predicate) D23_BARRIER(kCount, !!(predicate))
#define __syncthreads_and(predicate) D23_BARRIER(kAnd, !!(predicate))
#define __syncthreads_or(predicate) D23_BARRIER(kOr, !!(predicate))

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  d23_emulator::warp_exchange(d23_emulator::WarpOp::kSync, mask, 0, 0);
}
inline unsigned __activemask() { return d23_emulator::active_lanes(); }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(d23_emulator::warp_exchange(d23_emulator::WarpOp::kBallot, mask, predicate != 0, 0));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t bits = d23_emulator::to_bits(value);
  return static_cast<unsigned>(d23_emulator::warp_exchange(d23_emulator::WarpOp::kMatch, mask, bits, 0));
}

namespace d23_emulator {
template <class T>
T shuffle(unsigned mask, T value, int source) {
  return from_bits<T>(warp_exchange(WarpOp::kShuffle, mask, to_bits(value), source));
}
inline int segment(int width) { return lane() / width * width; }
}  // namespace d23_emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  return d23_emulator::shuffle(mask, value, d23_emulator::segment(width) + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = warpSize) {
  const int lane = d23_emulator::lane(), source = lane ^ flip;
  return d23_emulator::shuffle(mask, value, source >= d23_emulator::segment(width) + width ? lane : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = d23_emulator::lane(), source = lane - static_cast<int>(delta);
  return d23_emulator::shuffle(mask, value, source < d23_emulator::segment(width) ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = d23_emulator::lane(), source = lane + static_cast<int>(delta);
  return d23_emulator::shuffle(mask, value, source >= d23_emulator::segment(width) + width ? lane : source);
}

#define D23_WARP_REDUCE(name, op)                                                                       \
  inline unsigned __reduce_##name##_sync(unsigned mask, unsigned value) {                               \
    return static_cast<unsigned>(d23_emulator::warp_exchange(d23_emulator::WarpOp::op, mask, value, 0)); \
  }
D23_WARP_REDUCE(add, kAdd)
D23_WARP_REDUCE(min, kMin)
D23_WARP_REDUCE(max, kMax)
D23_WARP_REDUCE(and, kAnd)
D23_WARP_REDUCE(or, kOr)
D23_WARP_REDUCE(xor, kXor)
#undef D23_WARP_REDUCE

// ---- atomics: each returns the value before ----

// As in CUDA, the value has the target's type: an argument of another type is converted, never deduced.
template <class T>
struct d23_same {
  using type = T;
};
template <class T, class F>
T d23_atomic(T* target, F&& next) {
  d23_emulator::maybe_yield();
  const T before = *target;
  *target = next(before);
  return before;
}
#define D23_ATOMIC(name, expression)                                                  \
  template <class T>                                                                  \
  T name(T* target, typename d23_same<T>::type value) {                               \
    return d23_atomic(target, [&](T before) { return static_cast<T>(expression); });  \
  }
D23_ATOMIC(atomicAdd, before + value)
D23_ATOMIC(atomicSub, before - value)
D23_ATOMIC(atomicMin, value < before ? value : before)
D23_ATOMIC(atomicMax, value > before ? value : before)
D23_ATOMIC(atomicAnd, before & value)
D23_ATOMIC(atomicOr, before | value)
D23_ATOMIC(atomicXor, before ^ value)
D23_ATOMIC(atomicExch, value)
#undef D23_ATOMIC
template <class T>
T atomicCAS(T* target, typename d23_same<T>::type expected, typename d23_same<T>::type value) {
  return d23_atomic(target, [&](T before) { return before == expected ? value : before; });
}

// ---- arithmetic ----

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  else return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  else return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a ? __builtin_clz(static_cast<unsigned>(a)) : 32; }
inline int __clzll(long long a) { return a ? __builtin_clzll(static_cast<unsigned long long>(a)) : 64; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline int __float_as_int(float a) { return d23_emulator::from_bits<int>(d23_emulator::to_bits(a)); }
inline unsigned __float_as_uint(float a) { return d23_emulator::from_bits<unsigned>(d23_emulator::to_bits(a)); }
inline float __int_as_float(int a) { return d23_emulator::from_bits<float>(d23_emulator::to_bits(a)); }
inline float __uint_as_float(unsigned a) { return d23_emulator::from_bits<float>(d23_emulator::to_bits(a)); }
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

// ---- the runtime: one device whose memory is the host's, on which everything is done when a call returns ----

enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline const char* cudaGetErrorString(cudaError_t error) { return d23_emulator::error_text(error); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // launches return theirs
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  return bytes ? (void)std::memset(target, value, bytes) : (void)0, cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return bytes ? (void)std::memcpy(target, source, bytes) : (void)0, cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  return d23_emulator::allow_shared(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
}
