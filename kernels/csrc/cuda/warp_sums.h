// Sums of several numbers over a warp at once.
#pragma once

#include "cuda/launch.h"

namespace d23 {

// Adds v[0..N-1] over the 32 lanes. Lane l gets one of the sums in v[0] (for N <= 32) and its index as the result;
// an index >= N means that the lane holds none. Every step halves the numbers a lane is responsible for, handing the
// other half to its partner: 12 shuffles for 9 numbers, where one number at a time would need 45. All lanes take part.
template <int N>
__device__ __forceinline__ int warp_sums_of(float (&v)[N], int lane) {
  static_assert(N <= 32, "a lane can own one sum");
  int first = 0, count = N;
  int n = N;
#pragma unroll
  for (int offset = kWarpSize / 2; offset; offset /= 2) {
    const int half = (n + 1) / 2;
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float low = v[i], high = half + i < n ? v[half + i < N ? half + i : 0] : 0.0f;
      v[i] = (upper ? high : low) + __shfl_xor_sync(kFullWarp, upper ? low : high, offset);
    }
    first += upper ? half : 0;
    count = upper ? (count > half ? count - half : 0) : (count < half ? count : half);
    n = half;
  }
  return count > 0 ? first : N;
}

}  // namespace d23
