// Blending on a GPU: a block a tile, a thread a pixel. A warp covers 8 x 4 pixels, the shape that fewest Gaussians
// straddle, and skips those whose pixel rectangle misses it without computing anything.
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/rasterize.h"
#include "cuda/warp_sums.h"

namespace d23 {
namespace {

constexpr int kThreads = TILE * TILE;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kForwardBatch = kThreads;
constexpr int kBackwardBatch = 32;

// A Gaussian as the inner loops read it: relative to the tile, exponents in base 2 (gaussian_math.h, alpha_at).
struct Staged {
  float x, y, ha, hb, hc, log_opacity;
  int16_t x0, x1, y0, y1;  // pixel rectangle, relative to the tile
};

__device__ Staged stage(const Splat<float>& s, int origin_x, int origin_y) {
  const float half = 0.5f * static_cast<float>(LOG2E), whole = static_cast<float>(LOG2E);
  return {s.x - static_cast<float>(origin_x),
          s.y - static_cast<float>(origin_y),
          half * s.a,
          whole * s.b,
          half * s.c,
          s.log_opacity,
          static_cast<int16_t>(max(s.rect[0] - origin_x, 0)),
          static_cast<int16_t>(min(s.rect[1] - origin_x, TILE - 1)),
          static_cast<int16_t>(max(s.rect[2] - origin_y, 0)),
          static_cast<int16_t>(min(s.rect[3] - origin_y, TILE - 1))};
}

// Where a thread's pixel lies in its tile, and the corner of its warp's 8 x 4 pixels.
struct PixelOfThread {
  int warp_x, warp_y, x, y;
  __device__ PixelOfThread(int thread) {
    const int warp = thread / kWarpSize, lane = thread % kWarpSize;
    warp_x = warp % 2 * 8, warp_y = warp / 2 * 4;
    x = warp_x + lane % 8, y = warp_y + lane / 8;
  }
  __device__ bool warp_misses(const Staged& s) const {
    return s.x0 > warp_x + 7 || s.x1 < warp_x || s.y0 > warp_y + 3 || s.y1 < warp_y;
  }
};

// CMAX: channels known at compile time, so that colours stay in registers; pic.channels <= CMAX.
template <int CMAX>
__global__ void __launch_bounds__(kThreads)
    blend_forward_kernel(Picture pic, float* colors, float* alphas, float* transmittance, int32_t* last_ids) {
  __shared__ Staged items[kForwardBatch];
  __shared__ float item_colors[kForwardBatch * CMAX];
  const int across = tiles_across(pic.width), tile = blockIdx.x, thread = threadIdx.x;
  const int origin_x = tile % across * TILE, origin_y = tile / across * TILE;
  const int begin = pic.tile_offsets[tile], end = pic.tile_offsets[tile + 1];
  const PixelOfThread at(thread);
  const int x = origin_x + at.x, y = origin_y + at.y;
  const bool inside = x < pic.width && y < pic.height;
  const float px = at.x + 0.5f, py = at.y + 0.5f;
  float t = 1, color[CMAX] = {};
  int last = 0;
  bool done = !inside;
  for (int first = begin; first < end; first += kForwardBatch) {
    if (__syncthreads_count(done) == kThreads) break;
    const int count = min(kForwardBatch, end - first);
    if (thread < count) {
      const int32_t id = pic.ids[first + thread];
      items[thread] = stage(pic.splats[id], origin_x, origin_y);
#pragma unroll
      for (int c = 0; c < CMAX; ++c)
        if (c < pic.channels) item_colors[thread * CMAX + c] = pic.colors[static_cast<int64_t>(id) * pic.channels + c];
    }
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      if (i % 16 == 0 && __all_sync(kFullWarp, done)) break;
      const Staged& s = items[i];
      if (at.warp_misses(s) || done) continue;
      const auto a = alpha_at(px - s.x, py - s.y, s.ha, s.hb, s.hc, s.log_opacity, pic.max_alpha, pic.log_threshold);
      if (!a.valid) continue;
      const float w = a.alpha * t, next = t - w;
      if (!(next > pic.transmittance_stop)) {
        done = true;
        continue;
      }
#pragma unroll
      for (int c = 0; c < CMAX; ++c)
        if (c < pic.channels) color[c] += w * item_colors[i * CMAX + c];
      t = next;
      last = first - begin + i + 1;
    }
  }
  if (!inside) return;
  const int64_t p = static_cast<int64_t>(y) * pic.width + x;
#pragma unroll
  for (int c = 0; c < CMAX; ++c)
    if (c < pic.channels)
      colors[p * pic.channels + c] = color[c] + (pic.background ? t * pic.background[c] : 0.0f);
  alphas[p] = 1 - t;
  transmittance[p] = t;
  last_ids[p] = last;
}

// Back to front. Each warp adds its pixels' sums of a Gaussian with warp_sums_of; the eight warps' sums meet in shared
// memory and are added in order, so that the result does not depend on timing.
template <int CMAX>
__global__ void __launch_bounds__(kThreads)
    blend_backward_kernel(Picture pic, const int32_t* offsets, const float* transmittance, const int32_t* last_ids,
                          const float* v_colors, const float* v_alphas, float* slots) {
  // More than 32 sums do not fit warp_sums_of: the colours' are then added in a second call.
  constexpr int kFirst = CMAX <= 26 ? 6 + CMAX : 6, kSecond = CMAX <= 26 ? 1 : 32, kSums = 6 + CMAX;
  __shared__ Staged items[kBackwardBatch];
  __shared__ float item_colors[kBackwardBatch * CMAX];
  __shared__ int64_t item_slots[kBackwardBatch];
  __shared__ float warp_parts[kBackwardBatch][kWarps][kSums];
  __shared__ int tile_last;
  const int across = tiles_across(pic.width), tile = blockIdx.x, thread = threadIdx.x;
  const int tile_x = tile % across, tile_y = tile / across, slot_size = 6 + pic.channels;
  const int begin = pic.tile_offsets[tile], total = pic.tile_offsets[tile + 1] - begin;
  if (total == 0) return;
  const PixelOfThread at(thread);
  const int x = tile_x * TILE + at.x, y = tile_y * TILE + at.y, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const bool inside = x < pic.width && y < pic.height;
  const int64_t p = static_cast<int64_t>(y) * pic.width + x;
  const float px = at.x + 0.5f, py = at.y + 0.5f;
  const auto slot_of = [&](int index) {
    const int32_t id = pic.ids[begin + index];
    const TileRect r = tile_rect(pic.splats[id]);
    return static_cast<int64_t>(offsets[id] - offsets[0]) + (tile_y - r.y0) * (r.x1 - r.x0 + 1) + (tile_x - r.x0);
  };
  float v_color[CMAX], t = 1, behind = 0;
  const int last = inside ? last_ids[p] : 0;
  float v_t = inside && v_alphas ? -v_alphas[p] : 0.0f;  // ∂L/∂(final transmittance)
#pragma unroll
  for (int c = 0; c < CMAX; ++c) {
    v_color[c] = inside && c < pic.channels ? v_colors[p * pic.channels + c] : 0.0f;
    if (c < pic.channels && pic.background) v_t += v_color[c] * pic.background[c];
  }
  if (inside) t = transmittance[p];
  behind = t * v_t;
  if (thread == 0) tile_last = 0;
  __syncthreads();
  atomicMax(&tile_last, last);
  __syncthreads();
  for (int i = tile_last * slot_size + thread; i < total * slot_size; i += kThreads)
    slots[slot_of(i / slot_size) * slot_size + i % slot_size] = 0;

  for (int end = tile_last; end > 0; end -= kBackwardBatch) {
    const int first = max(0, end - kBackwardBatch), count = end - first;
    __syncthreads();  // the batch before has been read
    if (thread < count) {
      const int32_t id = pic.ids[begin + first + thread];
      items[thread] = stage(pic.splats[id], tile_x * TILE, tile_y * TILE);
      item_slots[thread] = slot_of(first + thread);
#pragma unroll
      for (int c = 0; c < CMAX; ++c)
        if (c < pic.channels) item_colors[thread * CMAX + c] = pic.colors[static_cast<int64_t>(id) * pic.channels + c];
    }
    for (int i = thread; i < count * kWarps * kSums; i += kThreads) (&warp_parts[0][0][0])[i] = 0;
    __syncthreads();
    for (int i = count - 1; i >= 0; --i) {
      const Staged& s = items[i];
      if (at.warp_misses(s)) continue;
      const float dx = px - s.x, dy = py - s.y;
      const auto a = alpha_at(dx, dy, s.ha, s.hb, s.hc, s.log_opacity, pic.max_alpha, pic.log_threshold);
      const bool counts = a.valid && first + i < last;
      if (!__any_sync(kFullWarp, counts)) continue;
      const float alpha = counts ? a.alpha : 0.0f, inv = 1 / (1 - alpha);
      t *= inv;  // in front of this Gaussian
      const float w = alpha * t;
      float c_v = 0, sums[kFirst], more[kSecond];
#pragma unroll
      for (int c = 0; c < CMAX; ++c) {
        if (c < pic.channels) c_v += item_colors[i * CMAX + c] * v_color[c];
        if constexpr (CMAX <= 26) sums[6 + c] = w * v_color[c];
        else if (c < 32) more[c] = w * v_color[c];
      }
      const float v_alpha = t * c_v - behind * inv;
      behind += w * c_v;
      const float g = a.unclamped ? alpha * v_alpha : 0.0f;
      sums[0] = g;
      sums[1] = g * dx;
      sums[2] = g * dy;
      sums[3] = g * dx * dx;
      sums[4] = g * dx * dy;
      sums[5] = g * dy * dy;
      const int owned = warp_sums_of<kFirst>(sums, lane);
      if (owned < kFirst) warp_parts[i][warp][owned] = sums[0];
      if constexpr (CMAX > 26) {
        const int owned_color = warp_sums_of<kSecond>(more, lane);
        if (6 + owned_color < kSums) warp_parts[i][warp][6 + owned_color] = more[0];
        if constexpr (CMAX > 32) {  // depth beside 32 channels
          float rest[1] = {w * v_color[32]};
          if (warp_sums_of<1>(rest, lane) == 0) warp_parts[i][warp][6 + 32] = rest[0];
        }
      }
    }
    __syncthreads();
    for (int i = thread; i < count * slot_size; i += kThreads) {
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += warp_parts[i / slot_size][w][i % slot_size];
      slots[item_slots[i / slot_size] * slot_size + i % slot_size] = sum;
    }
  }
}

template <class F>
int64_t with_channels(int channels, F&& f) {
  if (channels == 1) return f(std::integral_constant<int, 1>());
  if (channels == 3) return f(std::integral_constant<int, 3>());
  if (channels == 4) return f(std::integral_constant<int, 4>());
  if (channels <= 8) return f(std::integral_constant<int, 8>());
  if (channels <= 16) return f(std::integral_constant<int, 16>());
  return f(std::integral_constant<int, MAX_CHANNELS + 1>());
}

}  // namespace

int64_t blend_forward(const Picture& pic, float* colors, float* alphas, float* transmittance, int32_t* last_ids,
                      cudaStream_t stream) {
  const int tiles = tiles_across(pic.width) * tiles_across(pic.height);
  return with_channels(pic.channels, [&](auto cmax) -> int64_t {
    D23_LAUNCH((blend_forward_kernel<cmax.value>), tiles, kThreads, 0, stream, pic, colors, alphas,
               transmittance, last_ids);
    return D23_OK;
  });
}

int64_t blend_backward(const Picture& pic, const int32_t* offsets, const float* transmittance, const int32_t* last_ids,
                       const float* v_colors, const float* v_alphas, float* slots, cudaStream_t stream) {
  const int tiles = tiles_across(pic.width) * tiles_across(pic.height);
  return with_channels(pic.channels, [&](auto cmax) -> int64_t {
    D23_LAUNCH((blend_backward_kernel<cmax.value>), tiles, kThreads, 0, stream, pic, offsets,
               transmittance, last_ids, v_colors, v_alphas, slots);
    return D23_OK;
  });
}

}  // namespace d23
