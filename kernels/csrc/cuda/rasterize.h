// Between the two CUDA sources of the rasteriser.
#pragma once

#include "cuda/launch.h"
#include "rasterize_scene.h"

namespace d23 {

// Everything blending reads for one view; pointers into device memory.
struct Picture {
  const Splat<float>* splats;   // [G]
  const float* colors;          // [G, C]
  const int32_t* ids;           // Gaussians of all tiles, near to far within a tile
  const int32_t* tile_offsets;  // [tiles + 1], into ids
  const float* background;      // [C] or null
  int channels, width, height;
  float max_alpha, log_threshold, transmittance_stop;  // log_threshold: base 2
};

// colors [H, W, C], alphas, transmittance, last_ids [H, W]. Returns D23_OK or an error.
int64_t blend_forward(const Picture& pic, float* colors, float* alphas, float* transmittance, int32_t* last_ids,
                      cudaStream_t stream);

// slots [pairs of the view, 6 + C]: what csrc/cpu/rasterize.h says. offsets: of the view's Gaussians, whose first
// entry is the view's first pair.
int64_t blend_backward(const Picture& pic, const int32_t* offsets, const float* transmittance, const int32_t* last_ids,
                       const float* v_colors, const float* v_alphas, float* slots, cudaStream_t stream);

}  // namespace d23
