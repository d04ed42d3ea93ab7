// What the two CPU sources of the rasteriser share.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "rasterize_scene.h"

namespace d23 {

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
