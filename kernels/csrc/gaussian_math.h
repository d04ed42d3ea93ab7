// The arithmetic of Gaussian rasterisation, forward and backward, once for every processor: written over R, which
// is a pack of numbers on the CPU (cpu/simd.h) and a plain number in a CUDA thread.
//
// Projection follows "EWA volume splatting" (Zwicker et al. 2001) as 3D Gaussian Splatting uses it; the screen
// filter with opacity compensation is that of mip-splatting (Yu et al. 2024). Names: v_x is the gradient of the
// loss with respect to x.
#pragma once

#include "scalar_math.h"

namespace d23 {

constexpr int TILE = 16;       // pixels a side; a tile's Gaussians are sorted and blended together
constexpr int BLOCK = 4;       // pixels a side; a block's pixels are blended as one on the CPU
constexpr int MAX_CHANNELS = 32;
constexpr int MAX_SH = 16;     // coefficients at degree 3
constexpr int MAX_IMAGE_SIDE = 32767;  // pixel rectangles are kept in 16-bit numbers

// What every function needs to know of one view.
template <class S>
struct Camera {
  S r[9], t[3];          // world -> camera
  S pos[3];              // camera centre in the world, for view directions
  S fx, fy, cx, cy;      // pixels
  S lim_x_neg, lim_x_pos, lim_y_neg, lim_y_pos;  // of x/z and y/z in the Jacobian
  S eps2d, near_plane;
  int width, height;
  bool antialiased;

  D23_FN void set(const S* viewmat, const S* campos, const S* K, int w, int h, S eps, S near, bool aa) {
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) r[3 * i + j] = viewmat[4 * i + j];
      t[i] = viewmat[4 * i + 3];
      pos[i] = campos[i];
    }
    fx = K[0], fy = K[4], cx = K[2], cy = K[5];
    width = w, height = h, eps2d = eps, near_plane = near, antialiased = aa;
    // Far outside the image the linearisation of the projection is meaningless; 15 % beyond each border is the
    // limit that 3DGS and gsplat use.
    const S margin_x = S(0.15) * S(w) / fx, margin_y = S(0.15) * S(h) / fy;
    lim_x_pos = (S(w) - cx) / fx + margin_x, lim_x_neg = cx / fx + margin_x;
    lim_y_pos = (S(h) - cy) / fy + margin_y, lim_y_neg = cy / fy + margin_y;
  }
};

// A Gaussian on the screen, as blending reads it: 32 bytes in float.
template <class S>
struct Splat {
  S x, y;           // mean in pixels
  S a, b, c;        // inverse covariance: q(d) = a dx² + 2 b dx dy + c dy²
  S log_opacity;    // base 2, with the antialiasing compensation
  int16_t rect[4];  // first and last pixel column, first and last pixel row that it can reach; empty if first > last
};

template <class R>
struct Rotation {
  R m[9];
  R w, x, y, z, inv_norm;  // the unit quaternion and 1/‖q‖
};

// Rotation matrix of q/‖q‖ (wxyz).
template <class R>
D23_FN Rotation<R> rotation_from_quat(const R q[4]) {
  using S = typename Traits<R>::Scalar;
  Rotation<R> o;
  const R norm = sqrt_(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
  o.inv_norm = R(S(1)) / max_(norm, R(S(1e-12)));
  o.w = q[0] * o.inv_norm, o.x = q[1] * o.inv_norm, o.y = q[2] * o.inv_norm, o.z = q[3] * o.inv_norm;
  const R two = R(S(2)), one = R(S(1));
  o.m[0] = one - two * (o.y * o.y + o.z * o.z);
  o.m[1] = two * (o.x * o.y - o.w * o.z);
  o.m[2] = two * (o.x * o.z + o.w * o.y);
  o.m[3] = two * (o.x * o.y + o.w * o.z);
  o.m[4] = one - two * (o.x * o.x + o.z * o.z);
  o.m[5] = two * (o.y * o.z - o.w * o.x);
  o.m[6] = two * (o.x * o.z - o.w * o.y);
  o.m[7] = two * (o.y * o.z + o.w * o.x);
  o.m[8] = one - two * (o.x * o.x + o.y * o.y);
  return o;
}

// v_q for the rotation matrix's gradient v_m.
template <class R>
D23_FN void rotation_from_quat_vjp(const Rotation<R>& o, const R v[9], R v_q[4]) {
  using S = typename Traits<R>::Scalar;
  const R two = R(S(2));
  const R vw = two * (o.x * (v[7] - v[5]) + o.y * (v[2] - v[6]) + o.z * (v[3] - v[1]));
  const R vx = two * (o.y * (v[1] + v[3]) + o.z * (v[2] + v[6]) + o.w * (v[7] - v[5]) - two * o.x * (v[4] + v[8]));
  const R vy = two * (o.x * (v[1] + v[3]) + o.z * (v[5] + v[7]) + o.w * (v[2] - v[6]) - two * o.y * (v[0] + v[8]));
  const R vz = two * (o.x * (v[2] + v[6]) + o.y * (v[5] + v[7]) + o.w * (v[3] - v[1]) - two * o.z * (v[0] + v[4]));
  const R dot = o.w * vw + o.x * vx + o.y * vy + o.z * vz;  // the norm's part: only directions across q count
  v_q[0] = (vw - o.w * dot) * o.inv_norm;
  v_q[1] = (vx - o.x * dot) * o.inv_norm;
  v_q[2] = (vy - o.y * dot) * o.inv_norm;
  v_q[3] = (vz - o.z * dot) * o.inv_norm;
}

// Everything that projection computes on the way and its backward pass wants again.
template <class R>
struct Projection {
  Rotation<R> rot;
  R cam[3];                // mean in the camera frame
  R inv_z, ux, uy;         // 1/z and the clamped x/z, y/z of the Jacobian
  R n[9];                  // camera rotation · R(q) · diag(scale): a square root of the camera-frame covariance
  R p0[3], p1[3];          // rows of Jacobian · n: a square root of the screen covariance
  R xx, xy, yy, det0;      // screen covariance before the filter, and its determinant
  R a, b, c;               // inverse of the filtered covariance
  R x, y;                  // pixels
  R compensation;          // sqrt(det0 / det), or 1
  typename Traits<R>::Mask in_front, ux_free, uy_free;
};

template <class R, class S>
D23_FN Projection<R> project(const Camera<S>& cam, const R mean[3], const R quat[4], const R scale[3]) {
  Projection<R> o;
  for (int i = 0; i < 3; ++i)
    o.cam[i] = R(cam.r[3 * i]) * mean[0] + R(cam.r[3 * i + 1]) * mean[1] + R(cam.r[3 * i + 2]) * mean[2] + R(cam.t[i]);
  o.in_front = o.cam[2] > R(cam.near_plane);
  // Behind the camera nothing below matters, but it must not divide by zero.
  o.inv_z = R(S(1)) / select(o.in_front, o.cam[2], R(S(1)));
  const R u = o.cam[0] * o.inv_z, v = o.cam[1] * o.inv_z;
  o.ux = min_(max_(u, R(-cam.lim_x_neg)), R(cam.lim_x_pos));
  o.uy = min_(max_(v, R(-cam.lim_y_neg)), R(cam.lim_y_pos));
  o.ux_free = (u >= R(-cam.lim_x_neg)) & (u <= R(cam.lim_x_pos));
  o.uy_free = (v >= R(-cam.lim_y_neg)) & (v <= R(cam.lim_y_pos));
  o.x = R(cam.fx) * u + R(cam.cx);
  o.y = R(cam.fy) * v + R(cam.cy);

  o.rot = rotation_from_quat(quat);
  for (int i = 0; i < 3; ++i)
    for (int k = 0; k < 3; ++k)
      o.n[3 * i + k] = (R(cam.r[3 * i]) * o.rot.m[k] + R(cam.r[3 * i + 1]) * o.rot.m[3 + k] +
                        R(cam.r[3 * i + 2]) * o.rot.m[6 + k]) * scale[k];
  const R jx = R(cam.fx) * o.inv_z, jy = R(cam.fy) * o.inv_z;
  for (int k = 0; k < 3; ++k) {
    o.p0[k] = jx * (o.n[k] - o.ux * o.n[6 + k]);
    o.p1[k] = jy * (o.n[3 + k] - o.uy * o.n[6 + k]);
  }
  o.xx = o.p0[0] * o.p0[0] + o.p0[1] * o.p0[1] + o.p0[2] * o.p0[2];
  o.xy = o.p0[0] * o.p1[0] + o.p0[1] * o.p1[1] + o.p0[2] * o.p1[2];
  o.yy = o.p1[0] * o.p1[0] + o.p1[1] * o.p1[1] + o.p1[2] * o.p1[2];
  // ‖p0 × p1‖² equals xx·yy − xy² without its cancellation, which for thin Gaussians would leave only rounding.
  const R c0 = o.p0[1] * o.p1[2] - o.p0[2] * o.p1[1];
  const R c1 = o.p0[2] * o.p1[0] - o.p0[0] * o.p1[2];
  const R c2 = o.p0[0] * o.p1[1] - o.p0[1] * o.p1[0];
  o.det0 = c0 * c0 + c1 * c1 + c2 * c2;
  const R eps = R(cam.eps2d);
  const R det = max_(o.det0 + eps * (o.xx + o.yy + eps), R(S(1e-10)));
  const R inv_det = R(S(1)) / det;
  o.a = (o.yy + eps) * inv_det;
  o.b = -o.xy * inv_det;
  o.c = (o.xx + eps) * inv_det;
  o.compensation = cam.antialiased ? sqrt_(o.det0 * inv_det) : R(S(1));
  return o;
}

// Gradients that a Gaussian on the screen hands back to its 3D parameters.
template <class R>
struct ScreenGrad {
  R x, y, a, b, c, compensation, depth;
};

template <class R>
struct WorldGrad {
  R mean[3], quat[4], scale[3];
  R r[9], t[3];  // of the camera's rotation and translation, from this Gaussian
};

template <class R, class S>
D23_FN WorldGrad<R> project_vjp(const Camera<S>& cam, const Projection<R>& o, const R mean[3], const R scale[3],
                                const ScreenGrad<R>& v) {
  WorldGrad<R> g;
  const R zero = R(S(0)), half = R(S(0.5)), two = R(S(2));
  // Inverse of the filtered covariance Q: v_Σ = −Q v_Q Q, with off-diagonals shared by two entries.
  R g00 = -(o.a * o.a * v.a + o.a * o.b * v.b + o.b * o.b * v.c);
  R g01 = -(o.a * o.b * v.a + half * (o.a * o.c + o.b * o.b) * v.b + o.b * o.c * v.c);
  R g11 = -(o.b * o.b * v.a + o.b * o.c * v.b + o.c * o.c * v.c);
  if (cam.antialiased) {
    // d sqrt(det0/det) = ½ sqrt(det0/det) (d det0/det0 − d det/det); a Gaussian seen edge-on has det0 = 0 and no
    // usable slope there.
    const R h = half * v.compensation * o.compensation;
    const R inv_det0 = select(o.det0 > R(S(1e-20)), R(S(1)) / max_(o.det0, R(S(1e-20))), zero);
    g00 = g00 + h * (o.yy * inv_det0 - o.a);
    g01 = g01 - h * (o.xy * inv_det0 + o.b);
    g11 = g11 + h * (o.xx * inv_det0 - o.c);
  }
  R v_n[9];
  R v_ux = zero, v_uy = zero, v_jx = zero, v_jy = zero;  // jx = fx/z, jy = fy/z
  const R jx = R(cam.fx) * o.inv_z, jy = R(cam.fy) * o.inv_z;
  for (int k = 0; k < 3; ++k) {
    const R v_p0 = two * (g00 * o.p0[k] + g01 * o.p1[k]);
    const R v_p1 = two * (g01 * o.p0[k] + g11 * o.p1[k]);
    v_n[k] = jx * v_p0;
    v_n[3 + k] = jy * v_p1;
    v_n[6 + k] = -(o.ux * v_n[k] + o.uy * v_n[3 + k]);
    v_ux = v_ux - o.n[6 + k] * v_n[k];
    v_uy = v_uy - o.n[6 + k] * v_n[3 + k];
    v_jx = v_jx + v_p0 * (o.n[k] - o.ux * o.n[6 + k]);
    v_jy = v_jy + v_p1 * (o.n[3 + k] - o.uy * o.n[6 + k]);
  }
  // x = fx u + cx with the unclamped u = X/Z; the Jacobian's u passes gradient only where it was not clamped.
  const R v_u = R(cam.fx) * v.x + select(o.ux_free, v_ux, zero);
  const R v_v = R(cam.fy) * v.y + select(o.uy_free, v_uy, zero);
  R v_cam[3];
  v_cam[0] = v_u * o.inv_z;
  v_cam[1] = v_v * o.inv_z;
  v_cam[2] = v.depth - o.inv_z * (v_jx * jx + v_jy * jy + (v_u * o.cam[0] + v_v * o.cam[1]) * o.inv_z);

  R v_rot[9];
  for (int k = 0; k < 3; ++k) {
    g.mean[k] = R(cam.r[k]) * v_cam[0] + R(cam.r[3 + k]) * v_cam[1] + R(cam.r[6 + k]) * v_cam[2];
    g.t[k] = v_cam[k];
    R v_scale = zero;
    for (int i = 0; i < 3; ++i) {
      const R v_m = R(cam.r[i]) * v_n[k] + R(cam.r[3 + i]) * v_n[3 + k] + R(cam.r[6 + i]) * v_n[6 + k];
      v_scale = v_scale + v_m * o.rot.m[3 * i + k];
      v_rot[3 * i + k] = v_m * scale[k];
    }
    g.scale[k] = v_scale;
  }
  rotation_from_quat_vjp(o.rot, v_rot, g.quat);
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j)
      g.r[3 * i + j] = v_cam[i] * mean[j] + v_n[3 * i] * o.rot.m[3 * j] * scale[0] +
                       v_n[3 * i + 1] * o.rot.m[3 * j + 1] * scale[1] + v_n[3 * i + 2] * o.rot.m[3 * j + 2] * scale[2];
  return g;
}

// ---------------------------------------------------------------- spherical harmonics
// Real basis in the order and with the signs of 3DGS files, for a unit direction; (degree + 1)² values.
template <class R>
D23_FN void sh_basis(int degree, R x, R y, R z, R* o) {
  using S = typename Traits<R>::Scalar;
  o[0] = R(S(0.28209479177387814));
  if (degree < 1) return;
  const R c1 = R(S(0.4886025119029199));
  o[1] = -c1 * y;
  o[2] = c1 * z;
  o[3] = -c1 * x;
  if (degree < 2) return;
  const R xx = x * x, yy = y * y, zz = z * z;
  const R c2 = R(S(1.0925484305920792));
  o[4] = c2 * x * y;
  o[5] = -c2 * y * z;
  o[6] = R(S(0.31539156525252005)) * (R(S(2)) * zz - xx - yy);
  o[7] = -c2 * x * z;
  o[8] = R(S(0.5462742152960396)) * (xx - yy);
  if (degree < 3) return;
  const R c33 = R(S(0.5900435899266435)), c32 = R(S(2.890611442640554)), c31 = R(S(0.4570457994644658));
  o[9] = -c33 * y * (R(S(3)) * xx - yy);
  o[10] = c32 * x * y * z;
  o[11] = -c31 * y * (R(S(4)) * zz - xx - yy);
  o[12] = R(S(0.3731763325901154)) * z * (R(S(2)) * zz - R(S(3)) * (xx + yy));
  o[13] = -c31 * x * (R(S(4)) * zz - xx - yy);
  o[14] = R(S(1.445305721320277)) * z * (xx - yy);
  o[15] = -c33 * x * (xx - R(S(3)) * yy);
}

// v_dir += Σ_k v_o[k] ∂o[k]/∂dir, of the same polynomials.
template <class R>
D23_FN void sh_basis_vjp(int degree, R x, R y, R z, const R* v, R v_dir[3]) {
  using S = typename Traits<R>::Scalar;
  if (degree < 1) return;
  const R two = R(S(2)), three = R(S(3)), four = R(S(4)), six = R(S(6)), eight = R(S(8));
  const R c1 = R(S(0.4886025119029199));
  R vx = -c1 * v[3], vy = -c1 * v[1], vz = c1 * v[2];
  if (degree >= 2) {
    const R c2 = R(S(1.0925484305920792)), c20 = R(S(0.31539156525252005)), c22 = R(S(0.5462742152960396));
    vx = vx + c2 * (y * v[4] - z * v[7]) + two * x * (c22 * v[8] - c20 * v[6]);
    vy = vy + c2 * (x * v[4] - z * v[5]) - two * y * (c22 * v[8] + c20 * v[6]);
    vz = vz - c2 * (y * v[5] + x * v[7]) + four * c20 * z * v[6];
  }
  if (degree >= 3) {
    const R xx = x * x, yy = y * y, zz = z * z;
    const R c33 = R(S(0.5900435899266435)), c32 = R(S(2.890611442640554)), c31 = R(S(0.4570457994644658));
    const R c30 = R(S(0.3731763325901154)), c34 = R(S(1.445305721320277));
    vx = vx - c33 * six * x * y * v[9] + c32 * y * z * v[10] + c31 * two * x * y * v[11] - c30 * six * x * z * v[12] -
         c31 * (four * zz - three * xx - yy) * v[13] + c34 * two * x * z * v[14] - c33 * three * (xx - yy) * v[15];
    vy = vy - c33 * three * (xx - yy) * v[9] + c32 * x * z * v[10] - c31 * (four * zz - xx - three * yy) * v[11] -
         c30 * six * y * z * v[12] + c31 * two * x * y * v[13] - c34 * two * y * z * v[14] + c33 * six * x * y * v[15];
    vz = vz + c32 * x * y * v[10] - c31 * eight * z * (y * v[11] + x * v[13]) +
         c30 * (six * zz - three * (xx + yy)) * v[12] + c34 * (xx - yy) * v[14];
  }
  v_dir[0] = v_dir[0] + vx;
  v_dir[1] = v_dir[1] + vy;
  v_dir[2] = v_dir[2] + vz;
}

// max(0, x), leaving a mark for the backward pass: a clamped channel becomes minus zero. A channel that is exactly
// black, as in files made from 8-bit pictures, keeps its slope, as it does in PyTorch and gsplat.
template <class S>
D23_FN S clamp_color(S x) {
  return x < S(0) ? -(x - x) : x;  // minus zero; NaN for minus infinity, so that it is not lost
}
template <class S>
D23_FN bool was_clamped(S color) {
  return color == S(0) && S(1) / color < S(0);
}

// Unit vector from the camera to the Gaussian, and 1/distance.
template <class R, class S>
D23_FN R view_direction(const Camera<S>& cam, const R mean[3], R dir[3]) {
  for (int i = 0; i < 3; ++i) dir[i] = mean[i] - R(cam.pos[i]);
  const R norm = sqrt_(dir[0] * dir[0] + dir[1] * dir[1] + dir[2] * dir[2]);
  const R inv = R(S(1)) / max_(norm, R(S(1e-12)));
  for (int i = 0; i < 3; ++i) dir[i] = dir[i] * inv;
  return inv;
}

// ---------------------------------------------------------------- one Gaussian at one pixel
// Exponents are kept in base 2, because that is what processors raise. With q' = ½ log2(e) q the alpha is
// 2^(log2(opacity) − q').
constexpr double LOG2E = 1.4426950408889634;

template <class R>
struct PixelAlpha {
  R q, alpha;
  typename Traits<R>::Mask valid, unclamped;
};

// ha, hb, hc: ½ log2(e) a, log2(e) b, ½ log2(e) c. log_opacity: log2 of the opacity.
template <class R, class S>
D23_FN PixelAlpha<R> alpha_at(R dx, R dy, R ha, R hb, R hc, R log_opacity, S max_alpha, S log_threshold) {
  PixelAlpha<R> o;
  o.q = fma_(fma_(ha, dx, hb * dy), dx, hc * dy * dy);
  const R e = log_opacity - o.q;
  const R raw = exp2_(e);
  o.unclamped = raw <= R(max_alpha);
  o.alpha = min_(raw, R(max_alpha));
  // q < 0 can only be rounding of a Gaussian far thinner than a pixel; gsplat leaves it out, and so do we.
  o.valid = (e >= R(log_threshold)) & (o.q >= R(S(0)));
  return o;
}

// First and last pixel whose centre lies within `extent` of `center`, clipped to the image: first in [0, size],
// last in [-1, size - 1], and first > last where there is none. The constant stands second in min and max, so
// that a NaN ends up as the constant and the conversion to an integer stays defined.
template <class R>
D23_FN void pixel_range(R center, R extent, int size, R* first, R* last) {
  using S = typename Traits<R>::Scalar;
  *first = min_(max_(ceil_(center - extent - R(S(0.5))), R(S(0))), R(S(size)));
  *last = max_(min_(floor_(center + extent - R(S(0.5))), R(S(size - 1))), R(S(-1)));
}

// How far from its mean, in pixels, a Gaussian's alpha can reach the threshold along each axis: half the bounding
// box of the ellipse q = 2 ln(opacity / threshold), with a hair's breadth for rounding. Negative: nowhere.
template <class R, class S>
D23_FN void screen_extent(const Projection<R>& o, R log_opacity, S eps2d, S log_threshold, R* ex, R* ey) {
  const R reach = R(S(2 / LOG2E)) * (log_opacity - R(log_threshold));
  const typename Traits<R>::Mask seen = (reach > R(S(0))) & o.in_front;
  const R r = max_(reach, R(S(0)));
  *ex = select(seen, sqrt_(r * (o.xx + R(eps2d))) * R(S(1.0001)) + R(S(0.01)), R(S(-1)));
  *ey = select(seen, sqrt_(r * (o.yy + R(eps2d))) * R(S(1.0001)) + R(S(0.01)), R(S(-1)));
}

}  // namespace d23
