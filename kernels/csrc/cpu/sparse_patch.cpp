// Sums over the voxels of a patch, its inverse, which gives every voxel the row of its patch, and sums over all rows.
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/parallel.h"
#include "portable.h"

namespace d23 {
namespace {

constexpr int64_t kGrain = 256;

template <class T>
void patch_sum(const T* feats, const int32_t* children, const T* scale, T* out, int64_t num_patches, int64_t slots,
               int64_t channels, int64_t threads) {
  parallel_for(num_patches, kGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      T* to = out + m * channels;
      std::fill_n(to, channels, T(0));
      for (int64_t k = 0; k < slots; ++k) {
        const int64_t child = children[k * num_patches + m];
        if (child < 0) continue;
        const T* from = feats + child * channels;
        for (int64_t c = 0; c < channels; ++c) to[c] += from[c];
      }
      if (!scale) continue;
      for (int64_t c = 0; c < channels; ++c) to[c] *= scale[m];
    }
  });
}

template <class T>
void patch_copy(const T* feats, const int32_t* parents, const T* scale, T* out, int64_t count, int64_t channels,
                int64_t threads) {
  parallel_for(count, kGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = parents[i];
      const T* from = feats + m * channels;
      T* to = out + i * channels;
      if (!scale) {
        std::memcpy(to, from, channels * sizeof(T));
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) to[c] = from[c] * scale[m];
    }
  });
}

// out[c] = Σ_i feats[i][c], in pieces of fixed length whose sums are added in order. (torch's own sum would do, but
// its threads go on spinning for a while after it, on the cores that the kernels around it want.)
template <class T>
void row_sum(const T* feats, T* out, int64_t count, int64_t channels, int64_t threads) {
  const int64_t pieces = (count + kGrain - 1) / kGrain;
  std::vector<T> partial(pieces * channels, T(0));
  parallel_for(count, kGrain, threads, [&](int64_t begin, int64_t end) {
    T* sum = partial.data() + begin / kGrain * channels;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < channels; ++c) sum[c] += feats[i * channels + c];
    }
  });
  std::fill_n(out, channels, T(0));
  for (int64_t piece = 0; piece < pieces; ++piece) {
    for (int64_t c = 0; c < channels; ++c) out[c] += partial[piece * channels + c];
  }
}

template <class T>
int64_t row_sum_checked(const T* feats, T* out, int64_t count, int64_t channels, int64_t threads) {
  try {
    row_sum(feats, out, count, channels, threads);
    return D23_OK;
  } catch (const std::bad_alloc&) {
    return D23_OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace d23

// feats [num_voxels, channels], children [slots, num_patches] (-1: none), scale [num_patches] or null,
// out [num_patches, channels].
D23_EXPORT int64_t d23_patch_sum_f32(const float* feats, const int32_t* children, const float* scale, float* out,
                                     int64_t num_patches, int64_t slots, int64_t channels, int64_t num_threads) {
  d23::patch_sum(feats, children, scale, out, num_patches, slots, channels, num_threads);
  return D23_OK;
}

D23_EXPORT int64_t d23_patch_sum_f64(const double* feats, const int32_t* children, const double* scale, double* out,
                                     int64_t num_patches, int64_t slots, int64_t channels, int64_t num_threads) {
  d23::patch_sum(feats, children, scale, out, num_patches, slots, channels, num_threads);
  return D23_OK;
}

// feats [num_patches, channels], parents [count], scale [num_patches] or null, out [count, channels].
D23_EXPORT int64_t d23_patch_copy_f32(const float* feats, const int32_t* parents, const float* scale, float* out,
                                      int64_t count, int64_t channels, int64_t num_threads) {
  d23::patch_copy(feats, parents, scale, out, count, channels, num_threads);
  return D23_OK;
}

D23_EXPORT int64_t d23_patch_copy_f64(const double* feats, const int32_t* parents, const double* scale, double* out,
                                      int64_t count, int64_t channels, int64_t num_threads) {
  d23::patch_copy(feats, parents, scale, out, count, channels, num_threads);
  return D23_OK;
}

// feats [count, channels], out [channels].
D23_EXPORT int64_t d23_row_sum_f32(const float* feats, float* out, int64_t count, int64_t channels,
                                   int64_t num_threads) {
  return d23::row_sum_checked(feats, out, count, channels, num_threads);
}

D23_EXPORT int64_t d23_row_sum_f64(const double* feats, double* out, int64_t count, int64_t channels,
                                   int64_t num_threads) {
  return d23::row_sum_checked(feats, out, count, channels, num_threads);
}
