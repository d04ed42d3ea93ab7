// What every kernel source needs: one macro for functions that run on the CPU and on CUDA devices.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define D23_FN __host__ __device__ __forceinline__
#else
#define D23_FN inline __attribute__((always_inline))
#endif

// Exported with C linkage; every other symbol is hidden (-fvisibility=hidden).
#if defined(_WIN32)
#define D23_EXPORT extern "C" __declspec(dllexport)
#else
#define D23_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Negative results of exported functions; kernels/library.py turns them into messages.
enum : int64_t { D23_OK = 0, D23_OUT_OF_MEMORY = -1, D23_TOO_MANY = -2, D23_CUDA_ERROR = -3 };
