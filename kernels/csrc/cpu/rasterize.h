// What the two CPU sources of the rasteriser share.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "gaussian_math.h"

namespace d23 {

inline int tiles_across(int pixels) { return (pixels + TILE - 1) / TILE; }

// The tiles that a splat's pixel rectangle touches.
struct TileRect {
  int16_t x0, x1, y0, y1;  // inclusive
  int count() const { return (x1 - x0 + 1) * (y1 - y0 + 1); }
};

template <class S>
inline TileRect tile_rect(const Splat<S>& s) {
  return {static_cast<int16_t>(s.rect[0] / TILE), static_cast<int16_t>(s.rect[1] / TILE),
          static_cast<int16_t>(s.rect[2] / TILE), static_cast<int16_t>(s.rect[3] / TILE)};
}

template <class S>
inline bool on_screen(const Splat<S>& s) {
  return s.rect[0] <= s.rect[1] && s.rect[2] <= s.rect[3];
}

// The scene and the cameras, as Python passes them. sh_degree < 0: features are plain colours.
template <class S>
struct Scene {
  const S *means, *quats, *scales, *opacities;  // [G, 3], [G, 4], [G, 3], [G]
  const S* features;                            // [G, K, 3], or [G, C] or [V, G, C]
  const S *viewmats, *campos, *Ks;              // [V, 4, 4], [V, 3], [V, 3, 3]
  int64_t num_gaussians, num_views;
  int64_t feature_size, feature_view_stride;    // numbers a Gaussian; 0 where all views share them
  int sh_degree, channels;                      // channels of the picture, without depth
  bool with_depth, antialiased;
  int width, height;
  S eps2d, near_plane, alpha_threshold;

  int color_size() const { return channels + (with_depth ? 1 : 0); }
  Camera<S> camera(int64_t v) const {
    Camera<S> c;
    c.set(viewmats + 16 * v, campos + 3 * v, Ks + 9 * v, width, height, eps2d, near_plane, antialiased);
    return c;
  }
};

// Everything blending reads and writes for one picture.
template <class S>
struct Picture {
  const Splat<S>* splats;       // [G]
  const S* colors;              // [G, C]
  const int32_t* ids;           // Gaussians of all tiles, near to far within a tile
  const int32_t* tile_offsets;  // [tiles + 1], into ids
  const S* background;          // [C] or null
  int channels, width, height;
  S max_alpha, log_threshold, transmittance_stop;  // log_threshold: base 2
};

template <class S>
void blend_forward(const Picture<S>& pic, S* colors, S* alphas, S* transmittance, int32_t* last_ids, int64_t threads);

// Writes 6 + C numbers a (Gaussian, tile) pair: with g = alpha ∂L/∂alpha over the tile's pixels, the sums of
// g, g dx, g dy, g dx², g dx dy, g dy², and the gradient of the colour. slot_offsets[i] is where Gaussian i's
// pairs begin; they follow in the order of its tiles.
template <class S>
void blend_backward(const Picture<S>& pic, const int32_t* slot_offsets, const S* transmittance,
                    const int32_t* last_ids, const S* v_colors, const S* v_alphas, S* slots, int64_t threads);

}  // namespace d23
