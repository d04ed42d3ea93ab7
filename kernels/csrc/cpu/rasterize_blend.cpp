// Blending on the CPU. A tile is 16 x 16 pixels, cut into sixteen blocks of 4 x 4: small enough that most of a
// block's pixels lie inside a Gaussian that touches it, large enough to fill a vector register.
#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/rasterize.h"

namespace d23 {
namespace {

constexpr int BLOCKS = (TILE / BLOCK) * (TILE / BLOCK);
constexpr int BLOCK_PIXELS = BLOCK * BLOCK;
constexpr int BATCH = 256;  // Gaussians staged at a time, so that they, the lists and the pixels stay in L1
constexpr int COLORS = MAX_CHANNELS + 1;

// A Gaussian as the inner loops read it: relative to the tile, exponents in base 2 (gaussian_math.h, alpha_at).
template <class S>
struct Staged {
  S x, y, ha, hb, hc, log_opacity;
};

// The blocks that a splat's pixel rectangle touches, as a bit each.
template <class S>
inline uint16_t block_mask(const Splat<S>& s, int origin_x, int origin_y) {
  const int x0 = std::max(s.rect[0] - origin_x, 0) / BLOCK, x1 = std::min(s.rect[1] - origin_x, TILE - 1) / BLOCK;
  const int y0 = std::max(s.rect[2] - origin_y, 0) / BLOCK, y1 = std::min(s.rect[3] - origin_y, TILE - 1) / BLOCK;
  const unsigned columns = (2u << x1) - (1u << x0);               // bits x0..x1
  const unsigned rows = (16u << (4 * y1)) - (1u << (4 * y0));     // bits 4·y0 .. 4·y1 + 3
  return static_cast<uint16_t>(columns * 0x1111u & rows);
}

// Some Gaussians of a tile, side by side, with the blocks that each touches.
template <class S>
struct Batch {
  alignas(64) Staged<S> items[BATCH];
  alignas(64) uint16_t masks[BATCH];
};

#if defined(__GNUC__)
#define D23_PREFETCH(p, write) __builtin_prefetch(p, write)
#else
#define D23_PREFETCH(p, write)
#endif

// Splats lie in the order of the scene, so a tile's are scattered over memory: they are asked for well ahead.
template <class S>
inline void stage_batch(const Picture<S>& pic, const int32_t* ids, int count, int origin_x, int origin_y, Batch<S>& batch) {
  constexpr int AHEAD = 12;
  const S half = S(0.5 * LOG2E), whole = S(LOG2E);
  for (int i = 0; i < std::min(AHEAD, count); ++i) D23_PREFETCH(&pic.splats[ids[i]], 0);
  for (int i = 0; i < count; ++i) {
    if (i + AHEAD < count) D23_PREFETCH(&pic.splats[ids[i + AHEAD]], 0);
    D23_PREFETCH(pic.colors + static_cast<int64_t>(ids[i]) * pic.channels, 0);
    const Splat<S>& s = pic.splats[ids[i]];
    batch.items[i] = {s.x - S(origin_x), s.y - S(origin_y), half * s.a, whole * s.b, half * s.c, s.log_opacity};
    batch.masks[i] = block_mask(s, origin_x, origin_y);
  }
}

// Pixel centres of a block's lanes, relative to the block's corner.
template <class S>
struct LaneCenters {
  alignas(64) S x[BLOCK_PIXELS], y[BLOCK_PIXELS];
  LaneCenters() {
    for (int i = 0; i < BLOCK_PIXELS; ++i) {
      x[i] = S(i % BLOCK) + S(0.5);
      y[i] = S(i / BLOCK) + S(0.5);
    }
  }
};

// One number a pixel, block by block.
template <class S>
using TilePlane = S[BLOCKS][BLOCK_PIXELS];

// Calls f(pixel index in the image, block, lane) for the tile's pixels that lie in the image.
template <class F>
inline void for_each_pixel(int origin_x, int origin_y, int width, int height, F&& f) {
  const int nx = std::min(TILE, width - origin_x), ny = std::min(TILE, height - origin_y);
  for (int y = 0; y < ny; ++y) {
    const int64_t row = static_cast<int64_t>(origin_y + y) * width + origin_x;
    for (int x = 0; x < nx; ++x)
      f(row + x, (y / BLOCK) * (TILE / BLOCK) + x / BLOCK, (y % BLOCK) * BLOCK + x % BLOCK);
  }
}

template <class S>
struct ForwardTile {
  alignas(64) TilePlane<S> t;      // transmittance; 0 once the pixel has stopped
  alignas(64) TilePlane<S> final;  // transmittance of the finished pixel
  alignas(64) TilePlane<S> last;   // 1 + index in the tile's list of the last Gaussian that counted
  alignas(64) TilePlane<S> color[COLORS];
  Batch<S> batch;
  uint8_t list[BATCH + 16];  // the batch's Gaussians that touch the block at hand
};

// Blends one batch into one block; false when every pixel of it has stopped. CN is the number of channels where
// it is known at compile time, and then colours live in registers; 0 stands for any number.
template <class S, int CN>
bool blend_block(const Picture<S>& pic, const int32_t* ids, int first, int count, int block,
                 const LaneCenters<S>& lanes, ForwardTile<S>& tile) {
  using P = Pack<S>;
  constexpr int NV = BLOCK_PIXELS / P::W;
  const int channels = CN ? CN : pic.channels;
  const P stop(pic.transmittance_stop), zero(S(0));
  const S bx = S(block % (TILE / BLOCK) * BLOCK), by = S(block / (TILE / BLOCK) * BLOCK);
  P t[NV], final[NV], last[NV], px[NV], py[NV], color[CN ? CN : 1][NV];
  for (int n = 0; n < NV; ++n) {
    const int o = n * P::W;
    t[n] = P::load(tile.t[block] + o);
    final[n] = P::load(tile.final[block] + o);
    last[n] = P::load(tile.last[block] + o);
    px[n] = P::load(lanes.x + o) + P(bx);
    py[n] = P::load(lanes.y + o) + P(by);
    for (int c = 0; c < CN; ++c) color[c][n] = P::load(tile.color[c][block] + o);
  }
  bool live = true;
  const int size = indices_with_bit(tile.batch.masks, count, block, tile.list);
  for (int k = 0; k < size && live; ++k) {
    const int i = tile.list[k];
    const Staged<S>& s = tile.batch.items[i];
    const S* c_i = pic.colors + static_cast<int64_t>(ids[i]) * channels;
    const P index(S(first + i + 1));
    for (int n = 0; n < NV; ++n) {
      const auto a = alpha_at(px[n] - P(s.x), py[n] - P(s.y), P(s.ha), P(s.hb), P(s.hc), P(s.log_opacity),
                              pic.max_alpha, pic.log_threshold);
      const P w = a.alpha * t[n];
      const P next = t[n] - w;
      const auto counts = a.valid & (next > stop);
      const P used = select(counts, w, zero);
      if constexpr (CN > 0) {
        for (int c = 0; c < CN; ++c) color[c][n] = fma_(used, P(c_i[c]), color[c][n]);
      } else {
        for (int c = 0; c < channels; ++c) {
          S* at = tile.color[c][block] + n * P::W;
          fma_(used, P(c_i[c]), P::load(at)).store(at);
        }
      }
      final[n] = select(counts, next, final[n]);
      last[n] = select(counts, index, last[n]);
      t[n] = select(a.valid, select(counts, next, zero), t[n]);
    }
    if ((k & 7) == 7) {
      live = false;
      for (int n = 0; n < NV; ++n) live |= any(t[n] > zero);
    }
  }
  for (int n = 0; n < NV; ++n) {
    const int o = n * P::W;
    t[n].store(tile.t[block] + o);
    final[n].store(tile.final[block] + o);
    last[n].store(tile.last[block] + o);
    for (int c = 0; c < CN; ++c) color[c][n].store(tile.color[c][block] + o);
  }
  return live;
}

template <class S, int CN>
void blend_tile_forward(const Picture<S>& pic, int tile_index, const LaneCenters<S>& lanes, ForwardTile<S>& tile,
                        S* colors, S* alphas, S* transmittance, int32_t* last_ids) {
  const int across = tiles_across(pic.width);
  const int origin_x = tile_index % across * TILE, origin_y = tile_index / across * TILE;
  const int begin = pic.tile_offsets[tile_index], end = pic.tile_offsets[tile_index + 1];
  const int channels = CN ? CN : pic.channels;
  if (begin == end) {
    for_each_pixel(origin_x, origin_y, pic.width, pic.height, [&](int64_t p, int, int) {
      for (int c = 0; c < channels; ++c) colors[p * channels + c] = pic.background ? pic.background[c] : S(0);
      alphas[p] = S(0);
      transmittance[p] = S(1);
      last_ids[p] = 0;
    });
    return;
  }
  std::fill_n(&tile.t[0][0], TILE * TILE, S(1));
  std::fill_n(&tile.final[0][0], TILE * TILE, S(1));
  std::fill_n(&tile.last[0][0], TILE * TILE, S(0));
  for (int c = 0; c < channels; ++c) std::fill_n(&tile.color[c][0][0], TILE * TILE, S(0));
  unsigned alive = (1u << BLOCKS) - 1;
  for (int first = 0; first < end - begin && alive; first += BATCH) {
    const int32_t* ids = pic.ids + begin + first;
    const int count = std::min(BATCH, end - begin - first);
    stage_batch(pic, ids, count, origin_x, origin_y, tile.batch);
    for (int b = 0; b < BLOCKS; ++b)
      if ((alive >> b & 1) && !blend_block<S, CN>(pic, ids, first, count, b, lanes, tile)) alive &= ~(1u << b);
  }
  for_each_pixel(origin_x, origin_y, pic.width, pic.height, [&](int64_t p, int b, int l) {
    const S t = tile.final[b][l];
    for (int c = 0; c < channels; ++c)
      colors[p * channels + c] = tile.color[c][b][l] + (pic.background ? t * pic.background[c] : S(0));
    alphas[p] = S(1) - t;
    transmittance[p] = t;
    last_ids[p] = static_cast<int32_t>(tile.last[b][l]);
  });
}

template <class S>
struct BackwardTile {
  alignas(64) TilePlane<S> t;       // transmittance behind the Gaussian at hand
  alignas(64) TilePlane<S> behind;  // ∂L/∂colour · everything that lies behind it
  alignas(64) TilePlane<S> last;
  alignas(64) TilePlane<S> v_color[COLORS];
  int block_last[BLOCKS];
  Batch<S> batch;
  S* slots[BATCH];
};

template <class S, int CN>
int load_backward_tile(const Picture<S>& pic, int origin_x, int origin_y, const S* transmittance,
                       const int32_t* last_ids, const S* v_colors, const S* v_alphas, BackwardTile<S>& tile) {
  const int channels = CN ? CN : pic.channels;
  const bool whole = origin_x + TILE <= pic.width && origin_y + TILE <= pic.height;
  if (!whole) {  // pixels outside the image: no Gaussian counted there
    std::fill_n(&tile.t[0][0], TILE * TILE, S(1));
    std::fill_n(&tile.behind[0][0], TILE * TILE, S(0));
    std::fill_n(&tile.last[0][0], TILE * TILE, S(0));
    for (int c = 0; c < channels; ++c) std::fill_n(&tile.v_color[c][0][0], TILE * TILE, S(0));
  }
  for (int b = 0; b < BLOCKS; ++b) tile.block_last[b] = 0;
  for_each_pixel(origin_x, origin_y, pic.width, pic.height, [&](int64_t p, int b, int l) {
    S v_t = v_alphas ? -v_alphas[p] : S(0);  // ∂L/∂(final transmittance)
    for (int c = 0; c < channels; ++c) {
      const S v = v_colors[p * channels + c];
      tile.v_color[c][b][l] = v;
      if (pic.background) v_t += v * pic.background[c];
    }
    tile.t[b][l] = transmittance[p];
    tile.behind[b][l] = transmittance[p] * v_t;
    tile.last[b][l] = S(last_ids[p]);
    tile.block_last[b] = std::max(tile.block_last[b], static_cast<int>(last_ids[p]));
  });
  return *std::max_element(tile.block_last, tile.block_last + BLOCKS);
}

// Accumulates one Gaussian's sums over one block.
template <class S, int CN>
inline void backward_block(const Picture<S>& pic, const Staged<S>& s, const S* c_i, int index, int block,
                           const LaneCenters<S>& lanes, BackwardTile<S>& tile, Pack<S>* totals) {
  using P = Pack<S>;
  const int channels = CN ? CN : pic.channels;
  const P one(S(1)), zero(S(0));
  const S ox = S(block % (TILE / BLOCK) * BLOCK) - s.x, oy = S(block / (TILE / BLOCK) * BLOCK) - s.y;
  for (int o = 0; o < BLOCK_PIXELS; o += P::W) {
    const P dx = P::load(lanes.x + o) + P(ox), dy = P::load(lanes.y + o) + P(oy);
    const auto a = alpha_at(dx, dy, P(s.ha), P(s.hb), P(s.hc), P(s.log_opacity), pic.max_alpha, pic.log_threshold);
    const auto counts = a.valid & (P::load(tile.last[block] + o) > P(S(index)));
    if (!any(counts)) continue;
    const P alpha = select(counts, a.alpha, zero);
    const P inv = one / (one - alpha);
    const P t = P::load(tile.t[block] + o) * inv;  // in front of this Gaussian
    const P w = alpha * t;
    P c_v = zero;
    for (int c = 0; c < channels; ++c) {
      const P v = P::load(tile.v_color[c][block] + o);
      c_v = fma_(P(c_i[c]), v, c_v);
      totals[6 + c] = fma_(w, v, totals[6 + c]);
    }
    const P behind = P::load(tile.behind[block] + o);
    const P v_alpha = t * c_v - behind * inv;
    fma_(w, c_v, behind).store(tile.behind[block] + o);
    t.store(tile.t[block] + o);
    const P g = select(a.unclamped, alpha * v_alpha, zero);
    const P gx = g * dx, gy = g * dy;
    totals[0] = totals[0] + g;
    totals[1] = totals[1] + gx;
    totals[2] = totals[2] + gy;
    totals[3] = fma_(gx, dx, totals[3]);
    totals[4] = fma_(gx, dy, totals[4]);
    totals[5] = fma_(gy, dy, totals[5]);
  }
}

// One Gaussian over all blocks it touches: its sums go to its slot.
template <class S, int CN>
inline void blend_back(const Picture<S>& pic, int index, int32_t id, int i, const LaneCenters<S>& lanes,
                       BackwardTile<S>& tile) {
  using P = Pack<S>;
  const int channels = CN ? CN : pic.channels;
  const S* c_i = pic.colors + static_cast<int64_t>(id) * channels;
  P totals[6 + (CN ? CN : COLORS)];
  for (int k = 0; k < 6 + channels; ++k) totals[k] = P(S(0));
  for (unsigned mask = tile.batch.masks[i]; mask; mask &= mask - 1) {
    const int b = __builtin_ctz(mask);
    if (tile.block_last[b] > index)
      backward_block<S, CN>(pic, tile.batch.items[i], c_i, index, b, lanes, tile, totals);
  }
  sums(totals, 6 + channels, tile.slots[i]);
}

template <class S, int CN>
void blend_tile_backward(const Picture<S>& pic, int tile_index, const LaneCenters<S>& lanes, BackwardTile<S>& tile,
                         const int32_t* slot_offsets, const S* transmittance, const int32_t* last_ids,
                         const S* v_colors, const S* v_alphas, S* slots) {
  const int across = tiles_across(pic.width);
  const int tx = tile_index % across, ty = tile_index / across;
  const int begin = pic.tile_offsets[tile_index], count = pic.tile_offsets[tile_index + 1] - begin;
  if (count == 0) return;
  const int channels = CN ? CN : pic.channels, slot_size = 6 + channels;
  const int tile_last =
      load_backward_tile<S, CN>(pic, tx * TILE, ty * TILE, transmittance, last_ids, v_colors, v_alphas, tile);
  const auto slot_of = [&](int index) {
    const int32_t id = pic.ids[begin + index];
    const TileRect rect = tile_rect(pic.splats[id]);
    const int64_t slot = slot_offsets[id] + (ty - rect.y0) * (rect.x1 - rect.x0 + 1) + (tx - rect.x0);
    return slots + slot * slot_size;
  };
  for (int index = tile_last; index < count; ++index) std::fill_n(slot_of(index), slot_size, S(0));
  for (int end = tile_last; end > 0; end -= std::min(end, BATCH)) {
    const int first = std::max(0, end - BATCH);
    stage_batch(pic, pic.ids + begin + first, end - first, tx * TILE, ty * TILE, tile.batch);
    for (int i = 0; i < end - first; ++i) {
      tile.slots[i] = slot_of(first + i);
      D23_PREFETCH(tile.slots[i], 1);
    }
    for (int i = end - first - 1; i >= 0; --i) blend_back<S, CN>(pic, first + i, pic.ids[begin + first + i], i, lanes, tile);
  }
}

// This thread's tile. Behind a pointer, because the compiler would otherwise ask for the thread-local address again
// at every access, in the innermost loop too.
template <class Tile>
inline Tile& scratch() {
  static thread_local std::unique_ptr<Tile> tile(new Tile);
  return *tile;
}

// Calls f with the number of channels as a compile-time constant where one is instantiated, else with 0.
template <class F>
inline void with_channels(int channels, F&& f) {
  switch (channels) {
    case 1: return f(std::integral_constant<int, 1>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    default: return f(std::integral_constant<int, 0>());
  }
}

}  // namespace

template <class S>
void blend_forward(const Picture<S>& pic, S* colors, S* alphas, S* transmittance, int32_t* last_ids, int64_t threads) {
  const int tiles = tiles_across(pic.width) * tiles_across(pic.height);
  with_channels(pic.channels, [&](auto cn) {
    parallel_for(tiles, 4, threads, [&](int64_t begin, int64_t end) {
      ForwardTile<S>& tile = scratch<ForwardTile<S>>();
      const LaneCenters<S> lanes;
      for (int64_t i = begin; i < end; ++i)
        blend_tile_forward<S, cn.value>(pic, static_cast<int>(i), lanes, tile, colors, alphas, transmittance, last_ids);
    });
  });
}

template <class S>
void blend_backward(const Picture<S>& pic, const int32_t* slot_offsets, const S* transmittance,
                    const int32_t* last_ids, const S* v_colors, const S* v_alphas, S* slots, int64_t threads) {
  const int tiles = tiles_across(pic.width) * tiles_across(pic.height);
  with_channels(pic.channels, [&](auto cn) {
    parallel_for(tiles, 4, threads, [&](int64_t begin, int64_t end) {
      BackwardTile<S>& tile = scratch<BackwardTile<S>>();
      const LaneCenters<S> lanes;
      for (int64_t i = begin; i < end; ++i)
        blend_tile_backward<S, cn.value>(pic, static_cast<int>(i), lanes, tile, slot_offsets, transmittance, last_ids,
                                         v_colors, v_alphas, slots);
    });
  });
}

template void blend_forward<float>(const Picture<float>&, float*, float*, float*, int32_t*, int64_t);
template void blend_forward<double>(const Picture<double>&, double*, double*, double*, int32_t*, int64_t);
template void blend_backward<float>(const Picture<float>&, const int32_t*, const float*, const int32_t*, const float*,
                                    const float*, float*, int64_t);
template void blend_backward<double>(const Picture<double>&, const int32_t*, const double*, const int32_t*,
                                     const double*, const double*, double*, int64_t);

}  // namespace d23
