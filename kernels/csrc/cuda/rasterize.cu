// Gaussian rasterisation on a GPU: projection, depth-sorted tile lists, and the way back to the scene. One thread a
// (view, Gaussian) pair; the arithmetic is gaussian_math.h, the same as on the CPU. Blending: rasterize_blend.cu.
#include <cub/cub.cuh>

#include "cuda/launch.h"
#include "cuda/rasterize.h"
#include "cuda/warp_sums.h"
#include "rasterize_scene.h"

namespace d23 {
namespace {

constexpr int kBlock = 256;
constexpr int kCameraSums = 15;  // rotation 9, translation 3, camera position 3

__device__ bool finite_numbers(const float* values, int count) {
  float probe = 0;  // x − x is 0 for every finite x and NaN for the others
  for (int i = 0; i < count; ++i) probe += values[i] - values[i];
  return probe == 0;
}

struct Loaded {
  float mean[3], quat[4], scale[3], opacity;

  __device__ Loaded(const Scene<float>& s, int64_t i) {
    for (int k = 0; k < 3; ++k) mean[k] = s.means[3 * i + k];
    for (int k = 0; k < 4; ++k) quat[k] = s.quats[4 * i + k];
    for (int k = 0; k < 3; ++k) scale[k] = s.scales[3 * i + k];
    opacity = s.opacities[i];
  }
  __device__ int bad() const {
    return (finite_numbers(mean, 3) ? 0 : BAD_MEANS) | (finite_numbers(quat, 4) ? 0 : BAD_QUATS) |
           (finite_numbers(scale, 3) ? 0 : BAD_SCALES) | (finite_numbers(&opacity, 1) ? 0 : BAD_OPACITIES);
  }
};

// DEGREE < 0: plain colours.
template <int DEGREE>
__device__ void write_color(const Scene<float>& scene, const Camera<float>& cam, int64_t view, int64_t i,
                            const float mean[3], float depth, float* out) {
  const float* f = scene.features + view * scene.feature_view_stride + i * scene.feature_size;
  if constexpr (DEGREE >= 0) {
    constexpr int terms = (DEGREE + 1) * (DEGREE + 1);
    float dir[3], basis[terms];
    view_direction(cam, mean, dir);
    sh_basis(DEGREE, dir[0], dir[1], dir[2], basis);
    for (int c = 0; c < 3; ++c) {
      float sum = 0;
      for (int k = 0; k < terms; ++k) sum += basis[k] * f[3 * k + c];
      out[c] = clamp_color(sum + 0.5f);
    }
  } else {
    for (int c = 0; c < scene.channels; ++c) out[c] = f[c];
  }
  if (scene.with_depth) out[scene.channels] = depth;
}

// report[0]: BAD_* bits; report[1]: number of (Gaussian, tile) pairs.
template <int DEGREE>
__global__ void __launch_bounds__(kBlock)
    project_kernel(Scene<float> scene, Splat<float>* splats, float* depths, float* colors, int32_t* counts,
                   unsigned long long* report) {
  __shared__ unsigned long long warp_pairs[kBlock / kWarpSize];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  unsigned long long pairs = 0;
  if (index < scene.num_views * scene.num_gaussians) {
    const int64_t view = index / scene.num_gaussians, i = index % scene.num_gaussians;
    const Camera<float> cam = scene.camera(view);
    const Loaded g(scene, i);
    const auto o = project(cam, g.mean, g.quat, g.scale);
    const float log_opacity = log2_(max_(g.opacity * o.compensation, 1e-30f));
    float ex, ey, first, last;
    screen_extent(o, log_opacity, scene.eps2d, log2_(scene.alpha_threshold), &ex, &ey);
    Splat<float> s = {o.x, o.y, o.a, o.b, o.c, log_opacity, {}};
    pixel_range(o.x, ex, scene.width, &first, &last);
    s.rect[0] = static_cast<int16_t>(first), s.rect[1] = static_cast<int16_t>(ex > 0 ? last : -1.0f);
    pixel_range(o.y, ey, scene.height, &first, &last);
    s.rect[2] = static_cast<int16_t>(first), s.rect[3] = static_cast<int16_t>(last);
    int bad = g.bad();
    if (on_screen(s)) {
      pairs = tile_rect(s).count();
      if (colors) {
        float* color = colors + index * scene.color_size();
        write_color<DEGREE>(scene, cam, view, i, g.mean, o.cam[2], color);
        if (!finite_numbers(color, scene.color_size())) bad |= BAD_FEATURES;
      }
    }
    splats[index] = s;
    depths[index] = o.cam[2];
    counts[index] = static_cast<int32_t>(pairs);
    if (bad) atomicOr(report, static_cast<unsigned long long>(bad));
  }
  for (int offset = kWarpSize / 2; offset; offset /= 2) pairs += __shfl_xor_sync(kFullWarp, pairs, offset);
  if (threadIdx.x % kWarpSize == 0) warp_pairs[threadIdx.x / kWarpSize] = pairs;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kBlock / kWarpSize; ++w) pairs += warp_pairs[w];
    if (pairs) atomicAdd(report + 1, pairs);
  }
}

// Keys order pairs by view, tile and depth: positive floats order like their bits.
__global__ void __launch_bounds__(kBlock)
    list_pairs_kernel(const Splat<float>* splats, const float* depths, const int32_t* offsets, int64_t num_gaussians,
                      int64_t num_views, int across, int64_t tiles, uint64_t* keys, int32_t* ids) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (index >= num_views * num_gaussians) return;
  const Splat<float> s = splats[index];
  if (!on_screen(s)) return;
  const int64_t view = index / num_gaussians;
  const TileRect r = tile_rect(s);
  uint32_t depth_bits;
  memcpy(&depth_bits, depths + index, 4);
  int64_t at = offsets[index];
  for (int y = r.y0; y <= r.y1; ++y)
    for (int x = r.x0; x <= r.x1; ++x, ++at) {
      keys[at] = static_cast<uint64_t>(view * tiles + y * across + x) << 32 | depth_bits;
      ids[at] = static_cast<int32_t>(index % num_gaussians);
    }
}

// tile_offsets[view, tile] = first pair of that tile or of a later one, by bisection; tile runs to `tiles` inclusive.
__global__ void __launch_bounds__(kBlock)
    tile_offsets_kernel(const uint64_t* keys, int64_t pairs, int64_t tiles, int64_t num_views, int32_t* tile_offsets) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (index >= num_views * (tiles + 1)) return;
  const uint64_t wanted = static_cast<uint64_t>(index / (tiles + 1) * tiles + index % (tiles + 1));
  int64_t low = 0, high = pairs;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] >> 32 < wanted) low = middle + 1;
    else high = middle;
  }
  tile_offsets[index] = static_cast<int32_t>(low);
}

// ---------------------------------------------------------------- screen gradients -> scene gradients
struct SceneGrads {
  float *means, *quats, *scales, *opacities, *features;
};

template <int DEGREE>
__device__ void add_feature_grads(const Scene<float>& scene, int64_t view, int64_t i, bool visible, bool first,
                                  const float* color, const float* v_color, const float* basis, float* v_features,
                                  float* v_basis) {
  float* out = v_features + view * scene.feature_view_stride + i * scene.feature_size;
  if constexpr (DEGREE >= 0) {
    constexpr int terms = (DEGREE + 1) * (DEGREE + 1);
    const float* sh = scene.features + i * scene.feature_size;
    float v[3];
    for (int c = 0; c < 3; ++c) v[c] = visible && !was_clamped(color[c]) ? v_color[c] : 0.0f;
    for (int k = 0; k < terms; ++k) {
      v_basis[k] = 0;
      for (int c = 0; c < 3; ++c) {
        const float d = visible ? basis[k] * v[c] : 0.0f;
        out[3 * k + c] = first ? d : out[3 * k + c] + d;
        if (visible) v_basis[k] += sh[3 * k + c] * v[c];
      }
    }
  } else {
    const bool write = first || scene.feature_view_stride;
    for (int c = 0; c < scene.channels; ++c) {
      const float d = visible ? v_color[c] : 0.0f;
      out[c] = write ? d : out[c] + d;
    }
  }
}

// One Gaussian's gradients from one view; `camera` receives its part of the camera's.
template <int DEGREE>
__device__ WorldGrad<float> backward_gaussian(const Scene<float>& scene, const Camera<float>& cam, const Loaded& g,
                                              const float* slot, const float* basis, const float dir[3],
                                              float inv_distance, const float* v_basis, float* v_opacity,
                                              float camera[kCameraSums]) {
  const auto o = project(cam, g.mean, g.quat, g.scale);
  ScreenGrad<float> v;
  v.x = o.a * slot[1] + o.b * slot[2];
  v.y = o.b * slot[1] + o.c * slot[2];
  v.a = -0.5f * slot[3];
  v.b = -slot[4];
  v.c = -0.5f * slot[5];
  v.depth = scene.with_depth ? slot[DEGREE < 0 ? 6 + scene.channels : 9] : 0.0f;
  v.compensation = slot[0] / max_(o.compensation, 1e-30f);
  *v_opacity = g.opacity > 0 ? slot[0] / g.opacity : 0.0f;
  WorldGrad<float> w = project_vjp(cam, o, g.mean, g.scale, v);
  for (int k = 0; k < 9; ++k) camera[k] = w.r[k];
  for (int k = 0; k < 3; ++k) camera[9 + k] = w.t[k];
  if constexpr (DEGREE > 0) {
    float v_dir[3] = {0, 0, 0};
    sh_basis_vjp(DEGREE, dir[0], dir[1], dir[2], v_basis, v_dir);
    const float along = v_dir[0] * dir[0] + v_dir[1] * dir[1] + v_dir[2] * dir[2];
    for (int k = 0; k < 3; ++k) {
      const float v_k = (v_dir[k] - along * dir[k]) * inv_distance;
      w.mean[k] += v_k;
      camera[12 + k] = -v_k;
    }
  }
  return w;
}

// One thread a Gaussian, its views one after the other, so that sums have one order. camera_parts [blocks, V, 15].
template <int DEGREE>
__global__ void __launch_bounds__(kBlock)
    backward_scene_kernel(Scene<float> scene, const float* colors, int64_t color_view_stride, const int32_t* offsets,
                          const float* slots, int64_t view, SceneGrads grads, float* camera_parts) {
  constexpr int terms = DEGREE < 0 ? 1 : (DEGREE + 1) * (DEGREE + 1);
  __shared__ float warp_sums[kBlock / kWarpSize][kCameraSums];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  const int slot_size = 6 + scene.color_size();
  float camera[kCameraSums] = {};
  if (i < scene.num_gaussians) {
    const Camera<float> cam = scene.camera(view);
    const Loaded g(scene, i);
    const int64_t at = view * scene.num_gaussians + i;
    const int32_t begin = offsets[at], end = offsets[at + 1];
    const bool visible = begin < end, first = view == 0;
    constexpr int kSlot = DEGREE < 0 ? 6 + MAX_CHANNELS + 1 : 6 + 3 + 1;
    float slot[kSlot] = {}, basis[terms], v_basis[terms], dir[3] = {0, 0, 0}, inv_distance = 0, v_opacity = 0;
    const float* mine = slots + static_cast<int64_t>(begin - offsets[view * scene.num_gaussians]) * slot_size;
    for (int32_t s = begin; s < end; ++s, mine += slot_size) {
#pragma unroll
      for (int k = 0; k < kSlot; ++k)
        if (k < slot_size) slot[k] += mine[k];
    }
    if constexpr (DEGREE >= 0) {
      inv_distance = view_direction(cam, g.mean, dir);
      sh_basis(DEGREE, dir[0], dir[1], dir[2], basis);
    }
    const float* color = colors + view * color_view_stride + i * scene.color_size();
    add_feature_grads<DEGREE>(scene, view, i, visible, first, color, slot + 6, basis, grads.features, v_basis);
    WorldGrad<float> w = {};
    if (visible)
      w = backward_gaussian<DEGREE>(scene, cam, g, slot, basis, dir, inv_distance, v_basis, &v_opacity, camera);
    for (int k = 0; k < 3; ++k) {
      float *mean = grads.means + 3 * i + k, *scale = grads.scales + 3 * i + k;
      *mean = first ? w.mean[k] : *mean + w.mean[k];
      *scale = first ? w.scale[k] : *scale + w.scale[k];
    }
    for (int k = 0; k < 4; ++k) {
      float* quat = grads.quats + 4 * i + k;
      *quat = first ? w.quat[k] : *quat + w.quat[k];
    }
    grads.opacities[i] = first ? v_opacity : grads.opacities[i] + v_opacity;
  }
  const int lane = threadIdx.x % kWarpSize;
  const int owned = warp_sums_of<kCameraSums>(camera, lane);
  if (owned < kCameraSums) warp_sums[threadIdx.x / kWarpSize][owned] = camera[0];
  __syncthreads();
  if (threadIdx.x < kCameraSums) {
    float sum = 0;
    for (int w = 0; w < kBlock / kWarpSize; ++w) sum += warp_sums[w][threadIdx.x];
    camera_parts[static_cast<int64_t>(blockIdx.x) * kCameraSums + threadIdx.x] = sum;
  }
}

// One warp for each of the 15 numbers: its lanes add the blocks' parts in turn, then each other.
__global__ void camera_sum_kernel(const float* parts, int64_t blocks, float* v_viewmat, float* v_campos) {
  const int k = blockIdx.x, lane = threadIdx.x;
  double sum = 0;
  for (int64_t b = lane; b < blocks; b += kWarpSize) sum += parts[b * kCameraSums + k];
  for (int offset = kWarpSize / 2; offset; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
  if (lane != 0) return;
  if (k < 9) v_viewmat[4 * (k / 3) + k % 3] = static_cast<float>(sum);
  else if (k < 12) v_viewmat[4 * (k - 9) + 3] = static_cast<float>(sum);
  else v_campos[k - 12] = static_cast<float>(sum);
}

// ---------------------------------------------------------------- scratch memory
struct ProjectBuffers {
  unsigned long long* report;
  int32_t* counts;
  unsigned char* scan;
};

cudaError_t scan_counts(void* temp, size_t& bytes, const int32_t* counts, int32_t* offsets, int64_t n, cudaStream_t s) {
  return cub::DeviceScan::ExclusiveSum(temp, bytes, counts, offsets, n, s);
}

ProjectBuffers lay_out_project(Scratch& scratch, int64_t n, size_t scan_bytes) {
  return {scratch.take<unsigned long long>(2), scratch.take<int32_t>(n + 1), scratch.take<unsigned char>(scan_bytes)};
}

struct SortBuffers {
  uint64_t *keys, *sorted_keys;
  int32_t* ids;
  unsigned char* sort;
};

cudaError_t sort_pairs(void* temp, size_t& bytes, const SortBuffers& b, int32_t* sorted_ids, int64_t pairs, int64_t lists,
                       cudaStream_t s) {
  int bits = 32;
  while (bits < 64 && (lists >> (bits - 32)) > 0) ++bits;
  return cub::DeviceRadixSort::SortPairs(temp, bytes, b.keys, b.sorted_keys, b.ids, sorted_ids, pairs, 0, bits, s);
}

SortBuffers lay_out_sort(Scratch& scratch, int64_t pairs, size_t sort_bytes) {
  return {scratch.take<uint64_t>(pairs), scratch.take<uint64_t>(pairs), scratch.take<int32_t>(pairs),
          scratch.take<unsigned char>(sort_bytes)};
}

template <class F>
int64_t with_degree(int degree, F&& f) {
  switch (degree) {
    case 0: return f(std::integral_constant<int, 0>());
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, -1>());
  }
}

Picture picture_of(const Scene<float>& scene, int64_t view, const void* splats, const float* colors, int64_t stride,
                   const int32_t* ids, const int32_t* tile_offsets, const float* backgrounds, double max_alpha, double stop) {
  const int64_t tiles = static_cast<int64_t>(tiles_across(scene.width)) * tiles_across(scene.height);
  const int c = scene.color_size();
  return {static_cast<const Splat<float>*>(splats) + view * scene.num_gaussians,
          colors + view * stride,
          ids,
          tile_offsets + view * (tiles + 1),
          backgrounds ? backgrounds + view * c : nullptr,
          c,
          scene.width,
          scene.height,
          static_cast<float>(max_alpha),
          static_cast<float>(log2(static_cast<double>(scene.alpha_threshold))),
          static_cast<float>(stop)};
}

}  // namespace
}  // namespace d23

using namespace d23;

// n: views times Gaussians.
D23_EXPORT int64_t d23_raster_project_f32_scratch_bytes(int64_t n, void*) {
  size_t scan_bytes = 0;
  D23_CUDA_TRY(scan_counts(nullptr, scan_bytes, nullptr, nullptr, n + 1, nullptr));
  Scratch scratch;
  lay_out_project(scratch, n, scan_bytes);
  return scratch.bytes();
}

// Arguments and result as on the CPU (csrc/cpu/rasterize.cpp), and scratch memory. Waits for the number of pairs.
D23_EXPORT int64_t d23_raster_project_f32(D23_SCENE_ARGS(float), void* splats, float* depths, float* colors,
                                          int32_t* offsets, int64_t* bad, void* scratch_memory, void* stream_pointer) {
  D23_SCENE(float);
  const cudaStream_t stream = as_stream(stream_pointer);
  const int64_t n = num_views * num_gaussians;
  if (num_blocks(n, kBlock) > kMaxBlocks) return D23_TOO_MANY;
  size_t scan_bytes = 0;
  D23_CUDA_TRY(scan_counts(nullptr, scan_bytes, nullptr, nullptr, n + 1, nullptr));
  Scratch scratch(scratch_memory);
  const ProjectBuffers b = lay_out_project(scratch, n, scan_bytes);
  D23_CUDA_TRY(cudaMemsetAsync(b.report, 0, 2 * sizeof *b.report, stream));
  D23_CUDA_TRY(cudaMemsetAsync(b.counts + n, 0, sizeof *b.counts, stream));
  const int64_t launched = with_degree(scene.sh_degree, [&](auto degree) -> int64_t {
    D23_LAUNCH((project_kernel<degree.value>), num_blocks(n, kBlock), kBlock, 0, stream, scene,
               static_cast<Splat<float>*>(splats), depths, colors, b.counts, b.report);
    return D23_OK;
  });
  if (launched != D23_OK) return launched;
  unsigned long long report[2];
  D23_CUDA_TRY(cudaMemcpyAsync(report, b.report, sizeof report, cudaMemcpyDeviceToHost, stream));
  D23_CUDA_TRY(cudaMemcpyAsync(bad, b.report, sizeof *bad, cudaMemcpyDeviceToDevice, stream));
  D23_CUDA_TRY(cudaStreamSynchronize(stream));
  if (report[1] > INT32_MAX) return D23_TOO_MANY;
  D23_CUDA_TRY(scan_counts(b.scan, scan_bytes, b.counts, offsets, n + 1, stream));
  return static_cast<int64_t>(report[1]);
}

D23_EXPORT int64_t d23_raster_blend_f32_scratch_bytes(int64_t pairs, int64_t lists, void*) {
  size_t sort_bytes = 0;
  D23_CUDA_TRY(sort_pairs(nullptr, sort_bytes, SortBuffers{}, nullptr, pairs, lists, nullptr));
  Scratch scratch;
  lay_out_sort(scratch, pairs, sort_bytes);
  return scratch.bytes();
}

D23_EXPORT int64_t d23_raster_blend_f32(D23_SCENE_ARGS(float), const void* splats, const float* depths,
                                        const float* colors, int64_t color_view_stride, const int32_t* offsets,
                                        const float* backgrounds, double max_alpha, double stop, int32_t* ids,
                                        int32_t* tile_offsets, float* out, float* alphas, float* transmittance,
                                        int32_t* last_ids, int64_t pairs, void* scratch_memory, void* stream_pointer) {
  D23_SCENE(float);
  const cudaStream_t stream = as_stream(stream_pointer);
  const int across = tiles_across(scene.width);
  const int64_t tiles = static_cast<int64_t>(across) * tiles_across(scene.height), n = num_views * num_gaussians;
  size_t sort_bytes = 0;
  D23_CUDA_TRY(sort_pairs(nullptr, sort_bytes, SortBuffers{}, nullptr, pairs, num_views * tiles, nullptr));
  Scratch scratch(scratch_memory);
  const SortBuffers b = lay_out_sort(scratch, pairs, sort_bytes);
  if (pairs > 0) {
    D23_LAUNCH(list_pairs_kernel, num_blocks(n, kBlock), kBlock, 0, stream,
               static_cast<const Splat<float>*>(splats), depths, offsets, num_gaussians, num_views, across, tiles,
               b.keys, b.ids);
    D23_CUDA_TRY(sort_pairs(b.sort, sort_bytes, b, ids, pairs, num_views * tiles, stream));
  }
  D23_LAUNCH(tile_offsets_kernel, num_blocks(num_views * (tiles + 1), kBlock), kBlock, 0, stream,
             b.sorted_keys, pairs, tiles, num_views, tile_offsets);
  const int64_t pixels = width * height;
  for (int64_t v = 0; v < num_views; ++v) {
    const Picture pic = picture_of(scene, v, splats, colors, color_view_stride, ids, tile_offsets, backgrounds, max_alpha, stop);
    const int64_t status = blend_forward(pic, out + v * pixels * pic.channels, alphas + v * pixels,
                                         transmittance + v * pixels, last_ids + v * pixels, stream);
    if (status != D23_OK) return status;
  }
  return D23_OK;
}

D23_EXPORT int64_t d23_raster_backward_f32_scratch_bytes(int64_t num_gaussians, void*) {
  Scratch scratch;
  scratch.take<float>(num_blocks(num_gaussians, kBlock) * kCameraSums);
  return scratch.bytes();
}

D23_EXPORT int64_t d23_raster_backward_f32(
    D23_SCENE_ARGS(float), const void* splats, const float* colors, int64_t color_view_stride, const int32_t* offsets,
    const float* backgrounds, double max_alpha, double stop, const int32_t* ids, const int32_t* tile_offsets,
    const float* transmittance, const int32_t* last_ids, const float* v_out, const float* v_alphas, float* slots,
    float* v_means, float* v_quats, float* v_scales, float* v_opacities, float* v_features, float* v_viewmats,
    float* v_campos, void* scratch_memory, void* stream_pointer) {
  D23_SCENE(float);
  const cudaStream_t stream = as_stream(stream_pointer);
  const int64_t g = num_gaussians, c = scene.color_size(), pixels = width * height, blocks = num_blocks(g, kBlock);
  Scratch scratch(scratch_memory);
  float* camera_parts = scratch.take<float>(blocks * kCameraSums);
  const SceneGrads grads = {v_means, v_quats, v_scales, v_opacities, v_features};
  for (int64_t v = 0; v < num_views; ++v) {
    const Picture pic = picture_of(scene, v, splats, colors, color_view_stride, ids, tile_offsets, backgrounds, max_alpha, stop);
    int64_t status = blend_backward(pic, offsets + v * g, transmittance + v * pixels, last_ids + v * pixels,
                                    v_out + v * pixels * c, v_alphas ? v_alphas + v * pixels : nullptr, slots, stream);
    if (status != D23_OK) return status;
    status = with_degree(scene.sh_degree, [&](auto degree) -> int64_t {
      D23_LAUNCH((backward_scene_kernel<degree.value>), blocks, kBlock, 0, stream, scene, colors,
                 color_view_stride, offsets, slots, v, grads, camera_parts);
      return D23_OK;
    });
    if (status != D23_OK) return status;
    D23_LAUNCH(camera_sum_kernel, kCameraSums, kWarpSize, 0, stream, camera_parts, blocks,
               v_viewmats + 16 * v, v_campos + 3 * v);
  }
  return D23_OK;
}
