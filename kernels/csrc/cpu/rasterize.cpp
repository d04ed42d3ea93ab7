// Projection, depth order and tile lists on the CPU, and the way back from screen gradients to the scene.
#include "cpu/rasterize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

namespace d23 {
namespace {

constexpr int64_t CHUNK = 256;  // Gaussians a task; fixed, so that sums over chunks never depend on the threads

// W Gaussians' numbers, one lane each.
template <class S>
struct Gathered {
  using P = Pack<S>;
  P mean[3], quat[4], scale[3], opacity;

  // ids: W indices (the last one repeated where fewer are left).
  Gathered(const Scene<S>& scene, const int64_t* ids) {
    alignas(64) S soa[11][P::W];
    for (int l = 0; l < P::W; ++l) {
      const int64_t i = ids[l];
      for (int k = 0; k < 3; ++k) soa[k][l] = scene.means[3 * i + k];
      for (int k = 0; k < 4; ++k) soa[3 + k][l] = scene.quats[4 * i + k];
      for (int k = 0; k < 3; ++k) soa[7 + k][l] = scene.scales[3 * i + k];
      soa[10][l] = scene.opacities[i];
    }
    for (int k = 0; k < 3; ++k) mean[k] = P::load(soa[k]);
    for (int k = 0; k < 4; ++k) quat[k] = P::load(soa[3 + k]);
    for (int k = 0; k < 3; ++k) scale[k] = P::load(soa[7 + k]);
    opacity = P::load(soa[10]);
  }
};

// Indices begin + 0..W-1, clipped to the last one.
template <int W>
inline void lane_ids(int64_t begin, int64_t end, int64_t* ids) {
  for (int l = 0; l < W; ++l) ids[l] = std::min(begin + l, end - 1);
}

// colour = max(0, ½ + Σ_k Y_k sh_k), or the plain colours; depth as one more channel on request.
template <class S>
inline void write_color(const Scene<S>& scene, int64_t view, int64_t i, const S* basis, int basis_stride, S depth,
                        S* out) {
  const S* f = scene.features + view * scene.feature_view_stride + i * scene.feature_size;
  if (scene.sh_degree >= 0) {
    const int terms = (scene.sh_degree + 1) * (scene.sh_degree + 1);
    S rgb[3] = {S(0), S(0), S(0)};
    for (int k = 0; k < terms; ++k)
      for (int c = 0; c < 3; ++c) rgb[c] += basis[k * basis_stride] * f[3 * k + c];
    for (int c = 0; c < 3; ++c) out[c] = clamp_color(rgb[c] + S(0.5));
  } else {
    for (int c = 0; c < scene.channels; ++c) out[c] = f[c];
  }
  if (scene.with_depth) out[scene.channels] = depth;
}

template <class S>
inline bool all_finite(const S* values, int64_t count) {
  S probe = S(0);  // x − x is 0 for every finite x and NaN for the others
  for (int64_t i = 0; i < count; ++i) probe += values[i] - values[i];
  return probe == S(0);
}

template <class S>
int find_bad(const Scene<S>& s, int64_t begin, int64_t end) {
  const int64_t n = end - begin;
  int bad = 0;
  if (!all_finite(s.means + 3 * begin, 3 * n)) bad |= BAD_MEANS;
  if (!all_finite(s.quats + 4 * begin, 4 * n)) bad |= BAD_QUATS;
  if (!all_finite(s.scales + 3 * begin, 3 * n)) bad |= BAD_SCALES;
  if (!all_finite(s.opacities + begin, n)) bad |= BAD_OPACITIES;
  return bad;
}

// Projects the Gaussians [begin, end) into one view. Returns BAD_FEATURES if a visible one has such a colour.
template <class S>
int project_chunk(const Scene<S>& scene, int64_t view, const Camera<S>& cam, int64_t begin, int64_t end,
                  Splat<S>* splats, S* depths, S* colors, int32_t* tile_counts) {
  using P = Pack<S>;
  constexpr int W = P::W;
  const S log_threshold = std::log2(scene.alpha_threshold);
  const int color_size = scene.color_size();
  alignas(64) S lanes[11][W], basis[MAX_SH][W];
  int bad = 0;
  for (int64_t i = begin; i < end; i += W) {
    int64_t ids[W];
    lane_ids<W>(i, end, ids);
    const Gathered<S> g(scene, ids);
    const auto o = project(cam, g.mean, g.quat, g.scale);
    const P log_opacity = log2_(max_(g.opacity * o.compensation, P(S(1e-30))));
    P ex, ey, first, last;
    screen_extent(o, log_opacity, scene.eps2d, log_threshold, &ex, &ey);
    const P out[] = {o.x, o.y, o.a, o.b, o.c, log_opacity, o.cam[2]};
    for (int k = 0; k < 7; ++k) out[k].store(lanes[k]);
    pixel_range(o.x, ex, scene.width, &first, &last);
    first.store(lanes[7]), select(ex > P(S(0)), last, P(S(-1))).store(lanes[8]);
    pixel_range(o.y, ey, scene.height, &first, &last);
    first.store(lanes[9]), last.store(lanes[10]);
    if (scene.sh_degree >= 0) {
      P dir[3], y[MAX_SH];
      view_direction(cam, g.mean, dir);
      sh_basis(scene.sh_degree, dir[0], dir[1], dir[2], y);
      for (int k = 0; k < (scene.sh_degree + 1) * (scene.sh_degree + 1); ++k) y[k].store(basis[k]);
    }
    for (int l = 0; l < W && i + l < end; ++l) {
      Splat<S>& s = splats[i + l];
      s = {lanes[0][l], lanes[1][l], lanes[2][l], lanes[3][l], lanes[4][l], lanes[5][l], {}};
      for (int k = 0; k < 4; ++k) s.rect[k] = static_cast<int16_t>(lanes[7 + k][l]);
      depths[i + l] = lanes[6][l];
      const bool visible = on_screen(s);
      tile_counts[i + l] = visible ? tile_rect(s).count() : 0;
      if (!visible || !colors) continue;
      S* color = colors + (i + l) * color_size;
      write_color(scene, view, i + l, &basis[0][l], W, lanes[6][l], color);
      if (!all_finite(color, color_size)) bad |= BAD_FEATURES;
    }
  }
  return bad;
}

template <class S>
int64_t raster_project(const Scene<S>& scene, Splat<S>* splats, S* depths, S* colors, int32_t* offsets, int64_t* bad,
                       int64_t threads) {
  const int64_t g = scene.num_gaussians, chunks = (g + CHUNK - 1) / CHUNK;
  std::vector<int> chunk_bad(chunks, 0);
  std::vector<Camera<S>> cameras;
  for (int64_t v = 0; v < scene.num_views; ++v) cameras.push_back(scene.camera(v));
  parallel_for(chunks, 4, threads, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = c * CHUNK, end = std::min(begin + CHUNK, g);
      chunk_bad[c] = find_bad(scene, begin, end);
      for (int64_t v = 0; v < scene.num_views; ++v)
        chunk_bad[c] |= project_chunk(scene, v, cameras[v], begin, end, splats + v * g, depths + v * g,
                                      colors ? colors + v * g * scene.color_size() : nullptr, offsets + v * g);
    }
  });
  *bad = std::accumulate(chunk_bad.begin(), chunk_bad.end(), 0, [](int a, int b) { return a | b; });
  int64_t total = 0;
  for (int64_t i = 0; i < scene.num_views * g; ++i) {
    const int64_t count = offsets[i];
    offsets[i] = static_cast<int32_t>(total);
    total += count;
    if (total > INT32_MAX) return D23_TOO_MANY;
  }
  offsets[scene.num_views * g] = static_cast<int32_t>(total);
  return total;
}

// ---------------------------------------------------------------- depth order
struct Keyed {
  uint32_t key;
  int32_t id;
};

// Stable, three passes of 11 bits: positive floats order like their bits.
void sort_by_depth(std::vector<Keyed>& items, const float* depths) {
  for (Keyed& item : items) std::memcpy(&item.key, &depths[item.id], 4);
  std::vector<Keyed> other(items.size());
  for (int shift = 0; shift < 32; shift += 11) {
    uint32_t counts[2049] = {};
    for (const Keyed& item : items) ++counts[(item.key >> shift & 2047) + 1];
    for (int i = 0; i < 2048; ++i) counts[i + 1] += counts[i];
    for (const Keyed& item : items) other[counts[item.key >> shift & 2047]++] = item;
    items.swap(other);
  }
}

void sort_by_depth(std::vector<Keyed>& items, const double* depths) {
  std::stable_sort(items.begin(), items.end(), [&](const Keyed& a, const Keyed& b) { return depths[a.id] < depths[b.id]; });
}

// Lists each tile's Gaussians, near to far. Every thread owns a band of tile rows and walks all Gaussians in depth
// order, so that lists come out ordered and nothing is shared.
template <class S>
void bin_view(const Splat<S>* splats, const S* depths, int64_t num_gaussians, int width, int height, int32_t base,
              int32_t* ids, int32_t* tile_offsets, int64_t threads) {
  const int across = tiles_across(width), down = tiles_across(height);
  std::vector<Keyed> order;
  order.reserve(num_gaussians);
  for (int64_t i = 0; i < num_gaussians; ++i)
    if (on_screen(splats[i])) order.push_back({0, static_cast<int32_t>(i)});
  sort_by_depth(order, depths);
  std::vector<TileRect> rects(order.size());
  for (size_t i = 0; i < order.size(); ++i) rects[i] = tile_rect(splats[order[i].id]);

  const int64_t bands = std::max<int64_t>(1, std::min<int64_t>(threads, down));
  const auto for_band = [&](int64_t band, auto&& f) {
    const int first = static_cast<int>(band * down / bands), last = static_cast<int>((band + 1) * down / bands) - 1;
    for (size_t i = 0; i < order.size(); ++i) {
      const TileRect r = rects[i];
      for (int y = std::max<int>(r.y0, first); y <= std::min<int>(r.y1, last); ++y)
        for (int x = r.x0; x <= r.x1; ++x) f(y * across + x, order[i].id);
    }
  };
  std::vector<int32_t> cursor(static_cast<size_t>(across) * down, 0);
  parallel_for(bands, 1, threads, [&](int64_t b, int64_t) { for_band(b, [&](int tile, int32_t) { ++cursor[tile]; }); });
  int32_t at = base;
  for (int i = 0; i < across * down; ++i) {
    tile_offsets[i] = at;
    at += cursor[i];
    cursor[i] = tile_offsets[i];
  }
  tile_offsets[across * down] = at;
  parallel_for(bands, 1, threads, [&](int64_t b, int64_t) {
    for_band(b, [&](int tile, int32_t id) { ids[cursor[tile]++] = id; });
  });
}

// ---------------------------------------------------------------- screen gradients -> scene gradients
template <class S>
struct SceneGrads {
  S *means, *quats, *scales, *opacities, *features;  // shapes of the scene's
  S *viewmats, *campos;                              // [V, 4, 4], [V, 3], or null
};

// A chunk's contribution to its view's camera: rotation, translation, camera position.
template <class S>
struct CameraGrad {
  S r[9], t[3], pos[3];
};

// What the visible Gaussians of a chunk received on the screen, summed over their tiles in tile order.
template <class S>
inline void sum_slots(const S* slots, int32_t begin, int32_t end, int slot_size, S* out) {
  std::copy_n(slots + static_cast<int64_t>(begin) * slot_size, slot_size, out);
  for (int64_t s = begin + 1; s < end; ++s)
    for (int k = 0; k < slot_size; ++k) out[k] += slots[s * slot_size + k];
}

template <class S>
void add_feature_grads(const Scene<S>& scene, int64_t view, int64_t i, const S* color, const S* v_color, const S* basis,
                       int stride, S* v_features, S* v_basis) {
  S* out = v_features + view * scene.feature_view_stride + i * scene.feature_size;
  if (scene.sh_degree < 0) {
    for (int c = 0; c < scene.channels; ++c) out[c] += v_color[c];
    return;
  }
  const int terms = (scene.sh_degree + 1) * (scene.sh_degree + 1);
  const S* sh = scene.features + i * scene.feature_size;
  S v[3];
  for (int c = 0; c < 3; ++c) v[c] = was_clamped(color[c]) ? S(0) : v_color[c];
  for (int k = 0; k < terms; ++k) {
    const S y = basis[k * stride];
    for (int c = 0; c < 3; ++c) out[3 * k + c] += y * v[c];
    v_basis[k * stride] = sh[3 * k] * v[0] + sh[3 * k + 1] * v[1] + sh[3 * k + 2] * v[2];
  }
}

// One view's gradients of the Gaussians [begin, end), added to `grads`; returns the camera's part.
template <class S>
CameraGrad<S> backward_chunk(const Scene<S>& scene, int64_t view, const Camera<S>& cam, int64_t begin, int64_t end,
                             const S* colors, const int32_t* offsets, const S* slots, const SceneGrads<S>& grads) {
  using P = Pack<S>;
  constexpr int W = P::W;
  const int color_size = scene.color_size(), slot_size = 6 + color_size;
  const int terms = scene.sh_degree < 0 ? 0 : (scene.sh_degree + 1) * (scene.sh_degree + 1);
  P sum_r[9], sum_t[3], sum_pos[3];
  for (P& p : sum_r) p = P(S(0));
  for (P& p : sum_t) p = P(S(0));
  for (P& p : sum_pos) p = P(S(0));

  std::vector<int64_t> visible;
  for (int64_t i = begin; i < end; ++i)
    if (offsets[i] < offsets[i + 1]) visible.push_back(i);
  S slot[6 + MAX_CHANNELS + 1];
  alignas(64) S basis[MAX_SH][W], v_basis[MAX_SH][W], lanes[11][W];
  for (size_t first = 0; first < visible.size(); first += W) {
    const int count = static_cast<int>(std::min<size_t>(W, visible.size() - first));
    int64_t ids[W];
    for (int l = 0; l < W; ++l) ids[l] = visible[first + std::min(l, count - 1)];
    const Gathered<S> g(scene, ids);
    const auto o = project(cam, g.mean, g.quat, g.scale);
    P dir[3], y[MAX_SH], inv_distance(S(0));
    if (terms) {
      inv_distance = view_direction(cam, g.mean, dir);
      sh_basis(scene.sh_degree, dir[0], dir[1], dir[2], y);
      for (int k = 0; k < terms; ++k) y[k].store(basis[k]);
    }
    std::memset(lanes, 0, sizeof lanes);
    std::memset(v_basis, 0, sizeof v_basis);
    for (int l = 0; l < count; ++l) {
      const int64_t i = ids[l];
      sum_slots(slots, offsets[i] - offsets[0], offsets[i + 1] - offsets[0], slot_size, slot);
      for (int k = 0; k < 6; ++k) lanes[k][l] = slot[k];
      if (scene.with_depth) lanes[6][l] = slot[6 + scene.channels];
      add_feature_grads(scene, view, i, colors + i * color_size, slot + 6, &basis[0][l], W, grads.features, &v_basis[0][l]);
    }
    P m[7];
    for (int k = 0; k < 7; ++k) m[k] = P::load(lanes[k]);
    // q = a dx² + 2 b dx dy + c dy², alpha = opacity · exp(−q/2), and dx = pixel − x.
    const P alive = select(g.opacity > P(S(0)), P(S(1)) / max_(g.opacity, P(S(1e-30))), P(S(0)));
    ScreenGrad<P> v;
    v.x = o.a * m[1] + o.b * m[2];
    v.y = o.b * m[1] + o.c * m[2];
    v.a = P(S(-0.5)) * m[3];
    v.b = -m[4];
    v.c = P(S(-0.5)) * m[5];
    v.depth = m[6];
    v.compensation = m[0] / max_(o.compensation, P(S(1e-30)));
    const P v_opacity = m[0] * alive;
    WorldGrad<P> w = project_vjp(cam, o, g.mean, g.scale, v);
    if (terms) {
      for (int k = 0; k < terms; ++k) y[k] = P::load(v_basis[k]);
      P v_dir[3] = {P(S(0)), P(S(0)), P(S(0))};
      sh_basis_vjp(scene.sh_degree, dir[0], dir[1], dir[2], y, v_dir);
      // Through the normalisation: only the part across the direction remains.
      const P along = v_dir[0] * dir[0] + v_dir[1] * dir[1] + v_dir[2] * dir[2];
      for (int k = 0; k < 3; ++k) {
        const P v_k = (v_dir[k] - along * dir[k]) * inv_distance;
        w.mean[k] = w.mean[k] + v_k;
        sum_pos[k] = sum_pos[k] - v_k;
      }
    }
    // Lanes beyond `count` repeat a Gaussian, with zero gradients in, so they add nothing to the camera's sums.
    for (int k = 0; k < 9; ++k) sum_r[k] = sum_r[k] + w.r[k];
    for (int k = 0; k < 3; ++k) sum_t[k] = sum_t[k] + w.t[k];
    for (int k = 0; k < 3; ++k) w.mean[k].store(lanes[k]);
    for (int k = 0; k < 4; ++k) w.quat[k].store(lanes[3 + k]);
    for (int k = 0; k < 3; ++k) w.scale[k].store(lanes[7 + k]);
    v_opacity.store(lanes[10]);
    for (int l = 0; l < count; ++l) {
      const int64_t i = ids[l];
      for (int k = 0; k < 3; ++k) grads.means[3 * i + k] += lanes[k][l];
      for (int k = 0; k < 4; ++k) grads.quats[4 * i + k] += lanes[3 + k][l];
      for (int k = 0; k < 3; ++k) grads.scales[3 * i + k] += lanes[7 + k][l];
      grads.opacities[i] += lanes[10][l];
    }
  }
  CameraGrad<S> out;
  for (int k = 0; k < 9; ++k) out.r[k] = sum(sum_r[k]);
  for (int k = 0; k < 3; ++k) out.t[k] = sum(sum_t[k]), out.pos[k] = sum(sum_pos[k]);
  return out;
}

template <class S>
void zero_grads(const Scene<S>& scene, const SceneGrads<S>& grads, int64_t begin, int64_t end) {
  const int64_t n = end - begin;
  std::fill_n(grads.means + 3 * begin, 3 * n, S(0));
  std::fill_n(grads.quats + 4 * begin, 4 * n, S(0));
  std::fill_n(grads.scales + 3 * begin, 3 * n, S(0));
  std::fill_n(grads.opacities + begin, n, S(0));
  const int64_t copies = scene.feature_view_stride ? scene.num_views : 1;
  for (int64_t v = 0; v < copies; ++v)
    std::fill_n(grads.features + v * scene.feature_view_stride + begin * scene.feature_size, n * scene.feature_size, S(0));
}

template <class S>
void backward_view(const Scene<S>& scene, int64_t view, const S* colors, const int32_t* offsets, const S* slots,
                   const SceneGrads<S>& grads, int64_t threads) {
  const int64_t g = scene.num_gaussians, chunks = (g + CHUNK - 1) / CHUNK;
  const Camera<S> cam = scene.camera(view);
  std::vector<CameraGrad<S>> parts(chunks);
  parallel_for(chunks, 4, threads, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = c * CHUNK, end = std::min(begin + CHUNK, g);
      if (view == 0) zero_grads(scene, grads, begin, end);
      parts[c] = backward_chunk(scene, view, cam, begin, end, colors, offsets, slots, grads);
    }
  });
  if (!grads.viewmats) return;
  double total[15] = {};
  for (const CameraGrad<S>& p : parts) {
    for (int k = 0; k < 9; ++k) total[k] += p.r[k];
    for (int k = 0; k < 3; ++k) total[9 + k] += p.t[k], total[12 + k] += p.pos[k];
  }
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) grads.viewmats[16 * view + 4 * i + j] = static_cast<S>(total[3 * i + j]);
    grads.viewmats[16 * view + 4 * i + 3] = static_cast<S>(total[9 + i]);
    grads.campos[3 * view + i] = static_cast<S>(total[12 + i]);
  }
  for (int j = 0; j < 4; ++j) grads.viewmats[16 * view + 12 + j] = S(0);
}

template <class F>
int64_t guarded(F&& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return D23_OUT_OF_MEMORY;
  }
}

template <class S>
Picture<S> make_picture(const Splat<S>* splats, const S* colors, const int32_t* ids, const int32_t* tile_offsets,
                        const S* background, const Scene<S>& scene, double max_alpha, double stop) {
  return {splats, colors, ids, tile_offsets, background, scene.color_size(), scene.width, scene.height,
          S(max_alpha), std::log2(scene.alpha_threshold), S(stop)};
}

}  // namespace
}  // namespace d23

// The exported functions, once for float and once for double.
#define D23_DEFINE_RASTERIZER(S, SUFFIX)                                                                             \
  /* splats [V, G], depths [V, G], colors [V, G, C] or null (then features are the colours), offsets [V*G + 1]:     \
     running count of tiles; bad: BAD_* bits. Returns the number of (Gaussian, tile) pairs. */                       \
  D23_EXPORT int64_t d23_raster_project_##SUFFIX(D23_SCENE_ARGS(S), void* splats, S* depths, S* colors,              \
                                                 int32_t* offsets, int64_t* bad, int64_t threads) {                  \
    return d23::guarded([&] {                                                                                        \
      D23_SCENE(S);                                                                                                  \
      return d23::raster_project(scene, static_cast<d23::Splat<S>*>(splats), depths, colors, offsets, bad, threads); \
    });                                                                                                              \
  }                                                                                                                  \
  /* ids [pairs], tile_offsets [V, tiles + 1]; colors, alphas, transmittance, last_ids: [V, H, W(, C)]. */           \
  D23_EXPORT int64_t d23_raster_blend_##SUFFIX(                                                                      \
      D23_SCENE_ARGS(S), const void* splats, const S* depths, const S* colors, int64_t color_view_stride,            \
      const int32_t* offsets, const S* backgrounds, double max_alpha, double stop, int32_t* ids,                     \
      int32_t* tile_offsets, S* out, S* alphas, S* transmittance, int32_t* last_ids, int64_t threads) {              \
    return d23::guarded([&]() -> int64_t {                                                                           \
      D23_SCENE(S);                                                                                                  \
      const int64_t g = num_gaussians, c = scene.color_size(), pixels = width * height;                              \
      const int64_t tiles = int64_t(d23::tiles_across(width)) * d23::tiles_across(height);                           \
      for (int64_t v = 0; v < num_views; ++v) {                                                                      \
        const auto* view_splats = static_cast<const d23::Splat<S>*>(splats) + v * g;                                 \
        int32_t* view_tiles = tile_offsets + v * (tiles + 1);                                                        \
        d23::bin_view(view_splats, depths + v * g, g, width, height, offsets[v * g], ids, view_tiles, threads);      \
        const auto pic = d23::make_picture<S>(view_splats, colors + v * color_view_stride, ids, view_tiles,          \
                                              backgrounds ? backgrounds + v * c : nullptr, scene, max_alpha, stop);  \
        d23::blend_forward<S>(pic, out + v * pixels * c, alphas + v * pixels, transmittance + v * pixels,            \
                              last_ids + v * pixels, threads);                                                       \
      }                                                                                                              \
      return D23_OK;                                                                                                 \
    });                                                                                                              \
  }                                                                                                                  \
  /* slots: scratch for the pairs of the fullest view, 6 + C numbers each. v_viewmats, v_campos may be null. */      \
  D23_EXPORT int64_t d23_raster_backward_##SUFFIX(                                                                   \
      D23_SCENE_ARGS(S), const void* splats, const S* colors, int64_t color_view_stride, const int32_t* offsets,     \
      const S* backgrounds, double max_alpha, double stop, const int32_t* ids, const int32_t* tile_offsets,          \
      const S* transmittance, const int32_t* last_ids, const S* v_out, const S* v_alphas, S* slots, S* v_means,      \
      S* v_quats, S* v_scales, S* v_opacities, S* v_features, S* v_viewmats, S* v_campos, int64_t threads) {         \
    return d23::guarded([&]() -> int64_t {                                                                           \
      D23_SCENE(S);                                                                                                  \
      const int64_t g = num_gaussians, c = scene.color_size(), pixels = width * height;                              \
      const int64_t tiles = int64_t(d23::tiles_across(width)) * d23::tiles_across(height);                           \
      const d23::SceneGrads<S> grads = {v_means, v_quats, v_scales, v_opacities, v_features, v_viewmats, v_campos};  \
      for (int64_t v = 0; v < num_views; ++v) {                                                                      \
        const S* view_colors = colors + v * color_view_stride;                                                       \
        const auto pic = d23::make_picture<S>(static_cast<const d23::Splat<S>*>(splats) + v * g, view_colors, ids,   \
                                              tile_offsets + v * (tiles + 1),                                        \
                                              backgrounds ? backgrounds + v * c : nullptr, scene, max_alpha, stop);  \
        const int32_t* view_offsets = offsets + v * g;                                                               \
        d23::blend_backward<S>(pic, view_offsets, transmittance + v * pixels, last_ids + v * pixels,                 \
                               v_out + v * pixels * c, v_alphas ? v_alphas + v * pixels : nullptr,                   \
                               slots - view_offsets[0] * (6 + c), threads);                                          \
        d23::backward_view(scene, v, view_colors, view_offsets, slots, grads, threads);                              \
      }                                                                                                              \
      return D23_OK;                                                                                                 \
    });                                                                                                              \
  }

D23_DEFINE_RASTERIZER(float, f32)
D23_DEFINE_RASTERIZER(double, f64)
