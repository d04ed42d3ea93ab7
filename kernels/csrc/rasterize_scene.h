// What the CPU and the CUDA rasteriser are given, and how screens are cut into tiles.
#pragma once

#include "gaussian_math.h"

namespace d23 {

D23_FN int tiles_across(int pixels) { return (pixels + TILE - 1) / TILE; }

// The tiles that a splat's pixel rectangle touches.
struct TileRect {
  int16_t x0, x1, y0, y1;  // inclusive
  D23_FN int count() const { return (x1 - x0 + 1) * (y1 - y0 + 1); }
};

template <class S>
D23_FN TileRect tile_rect(const Splat<S>& s) {
  return {static_cast<int16_t>(s.rect[0] / TILE), static_cast<int16_t>(s.rect[1] / TILE),
          static_cast<int16_t>(s.rect[2] / TILE), static_cast<int16_t>(s.rect[3] / TILE)};
}

template <class S>
D23_FN bool on_screen(const Splat<S>& s) {
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

  D23_FN int color_size() const { return channels + (with_depth ? 1 : 0); }
  D23_FN Camera<S> camera(int64_t v) const {
    Camera<S> c;
    c.set(viewmats + 16 * v, campos + 3 * v, Ks + 9 * v, width, height, eps2d, near_plane, antialiased);
    return c;
  }
};

// Bits of the result of raster_project's `bad` output: which argument holds a number that is not finite.
enum { BAD_MEANS = 1, BAD_QUATS = 2, BAD_SCALES = 4, BAD_OPACITIES = 8, BAD_FEATURES = 16 };

}  // namespace d23

// The leading arguments of every exported function of the rasteriser, in the order of kernels/rasterize.py.
#define D23_SCENE_ARGS(S)                                                                                            \
  const S *means, const S *quats, const S *scales, const S *opacities, const S *features, const S *viewmats,        \
      const S *campos, const S *Ks, int64_t num_gaussians, int64_t num_views, int64_t feature_size,                 \
      int64_t feature_view_stride, int64_t sh_degree, int64_t channels, int64_t with_depth, int64_t antialiased,    \
      int64_t width, int64_t height, double eps2d, double near_plane, double alpha_threshold
#define D23_SCENE(S)                                                                                                 \
  d23::Scene<S> scene = {means,        quats,     scales,       opacities,           features,      viewmats,       \
                         campos,       Ks,        num_gaussians, num_views,          feature_size,  feature_view_stride, \
                         int(sh_degree), int(channels), with_depth != 0, antialiased != 0, int(width), int(height), \
                         S(eps2d),     S(near_plane), S(alpha_threshold)}
