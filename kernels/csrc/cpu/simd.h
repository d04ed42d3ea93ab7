// Packs: W numbers handled as one. The kernels are written once over a pack type and compiled for what the
// processor offers:
//
//   Pack<float>   16 lanes with AVX-512, 8 with AVX2, else 4 in plain loops that the compiler turns into NEON or SSE
//   Pack<double>  1 lane: used to test the arithmetic (gradcheck), not for speed
//
// A comparison gives a Mask; select(mask, a, b) takes a where it is set. The same names exist for plain float and
// double in scalar_math.h, so that arithmetic written over R runs on packs, on scalars and on CUDA threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
// GCC 12 warns of its own intrinsics (bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#include "portable.h"
#include "scalar_math.h"

namespace d23 {

// 2^f on [-0.5, 0.5], degree 5, minimax in relative error: 9e-8, 1.9e-7 with the rounding of float.
#define D23_EXP2_C5 1.3264730806e-03f
#define D23_EXP2_C4 9.6715139225e-03f
#define D23_EXP2_C3 5.5507335812e-02f
#define D23_EXP2_C2 2.4022242427e-01f
#define D23_EXP2_C1 6.9314700365e-01f

// ---------------------------------------------------------------- plain loops: every compiler, any width
template <class S, int N>
struct GenericMask {
  bool m[N];
};

template <class S, int N>
struct GenericPack {
  using Scalar = S;
  using Mask = GenericMask<S, N>;
  static constexpr int W = N;
  S v[N];

  GenericPack() = default;
  D23_FN GenericPack(S s) {
    for (int i = 0; i < N; ++i) v[i] = s;
  }
  static D23_FN GenericPack load(const S* p) {
    GenericPack r;
    for (int i = 0; i < N; ++i) r.v[i] = p[i];
    return r;
  }
  D23_FN void store(S* p) const {
    for (int i = 0; i < N; ++i) p[i] = v[i];
  }
};

#define D23_LANES(expr)                    \
  {                                        \
    GenericPack<S, N> r;                   \
    for (int i = 0; i < N; ++i) r.v[i] = expr; \
    return r;                              \
  }
#define D23_MASKS(expr)                    \
  {                                        \
    GenericMask<S, N> r;                   \
    for (int i = 0; i < N; ++i) r.m[i] = expr; \
    return r;                              \
  }
#define D23_GP template <class S, int N> D23_FN GenericPack<S, N>
#define D23_GM template <class S, int N> D23_FN GenericMask<S, N>
#define D23_GA const GenericPack<S, N>&a
#define D23_GB const GenericPack<S, N>&b
D23_GP operator+(D23_GA, D23_GB) D23_LANES(a.v[i] + b.v[i])
D23_GP operator-(D23_GA, D23_GB) D23_LANES(a.v[i] - b.v[i])
D23_GP operator*(D23_GA, D23_GB) D23_LANES(a.v[i] * b.v[i])
D23_GP operator/(D23_GA, D23_GB) D23_LANES(a.v[i] / b.v[i])
D23_GP operator-(D23_GA) D23_LANES(-a.v[i])
D23_GP fma_(D23_GA, D23_GB, const GenericPack<S, N>& c) D23_LANES(a.v[i] * b.v[i] + c.v[i])
D23_GP min_(D23_GA, D23_GB) D23_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i])
D23_GP max_(D23_GA, D23_GB) D23_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i])
D23_GP sqrt_(D23_GA) D23_LANES(std::sqrt(a.v[i]))
D23_GP log2_(D23_GA) D23_LANES(std::log2(a.v[i]))
D23_GP ceil_(D23_GA) D23_LANES(std::ceil(a.v[i]))
D23_GP floor_(D23_GA) D23_LANES(std::floor(a.v[i]))
D23_GP select(const GenericMask<S, N>& m, D23_GA, D23_GB) D23_LANES(m.m[i] ? a.v[i] : b.v[i])
D23_GM operator<(D23_GA, D23_GB) D23_MASKS(a.v[i] < b.v[i])
D23_GM operator<=(D23_GA, D23_GB) D23_MASKS(a.v[i] <= b.v[i])
D23_GM operator>(D23_GA, D23_GB) D23_MASKS(a.v[i] > b.v[i])
D23_GM operator>=(D23_GA, D23_GB) D23_MASKS(a.v[i] >= b.v[i])
D23_GM operator&(const GenericMask<S, N>& a, const GenericMask<S, N>& b) D23_MASKS(a.m[i] && b.m[i])
D23_GM andnot(const GenericMask<S, N>& a, const GenericMask<S, N>& b) D23_MASKS(a.m[i] && !b.m[i])
template <class S, int N>
D23_FN bool any(const GenericMask<S, N>& m) {
  bool r = false;
  for (int i = 0; i < N; ++i) r |= m.m[i];
  return r;
}
template <class S, int N>
D23_FN S sum(D23_GA) {
  S r = a.v[0];
  for (int i = 1; i < N; ++i) r += a.v[i];
  return r;
}
template <class S, int N>
D23_FN void sums(const GenericPack<S, N>* a, int count, S* out) {
  for (int i = 0; i < count; ++i) out[i] = sum(a[i]);
}
template <int N>
D23_FN GenericPack<double, N> exp2_(const GenericPack<double, N>& a) {
  GenericPack<double, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = std::exp2(a.v[i]);
  return r;
}
template <int N>
D23_FN GenericPack<float, N> exp2_(const GenericPack<float, N>& a) {
  GenericPack<float, N> r;
  for (int i = 0; i < N; ++i) {
    const float x = a.v[i] > -126.0f ? (a.v[i] < 126.0f ? a.v[i] : 126.0f) : -126.0f;  // NaN becomes -126
    const int32_t n = static_cast<int32_t>(x + (x < 0 ? -0.5f : 0.5f));
    const float f = x - static_cast<float>(n);
    float p = D23_EXP2_C5 * f + D23_EXP2_C4;
    p = p * f + D23_EXP2_C3;
    p = p * f + D23_EXP2_C2;
    p = p * f + D23_EXP2_C1;
    p = p * f + 1.0f;
    const int32_t bits = (n + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    r.v[i] = p * scale;
  }
  return r;
}
#undef D23_LANES
#undef D23_MASKS
#undef D23_GP
#undef D23_GM
#undef D23_GA
#undef D23_GB

// ---------------------------------------------------------------- AVX-512: 16 floats
#if defined(__AVX512F__)
struct Mask16 {
  __mmask16 m;
};
struct Float16 {
  using Scalar = float;
  using Mask = Mask16;
  static constexpr int W = 16;
  __m512 v;

  Float16() = default;
  D23_FN Float16(__m512 x) : v(x) {}
  D23_FN Float16(float s) : v(_mm512_set1_ps(s)) {}
  static D23_FN Float16 load(const float* p) { return _mm512_loadu_ps(p); }
  D23_FN void store(float* p) const { _mm512_storeu_ps(p, v); }
};
D23_FN Float16 operator+(Float16 a, Float16 b) { return _mm512_add_ps(a.v, b.v); }
D23_FN Float16 operator-(Float16 a, Float16 b) { return _mm512_sub_ps(a.v, b.v); }
D23_FN Float16 operator*(Float16 a, Float16 b) { return _mm512_mul_ps(a.v, b.v); }
D23_FN Float16 operator/(Float16 a, Float16 b) { return _mm512_div_ps(a.v, b.v); }
D23_FN Float16 operator-(Float16 a) { return _mm512_sub_ps(_mm512_setzero_ps(), a.v); }
D23_FN Float16 fma_(Float16 a, Float16 b, Float16 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
D23_FN Float16 min_(Float16 a, Float16 b) { return _mm512_min_ps(a.v, b.v); }
D23_FN Float16 max_(Float16 a, Float16 b) { return _mm512_max_ps(a.v, b.v); }
D23_FN Float16 sqrt_(Float16 a) { return _mm512_sqrt_ps(a.v); }
D23_FN Float16 ceil_(Float16 a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
D23_FN Float16 floor_(Float16 a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
D23_FN Float16 select(Mask16 m, Float16 a, Float16 b) { return _mm512_mask_blend_ps(m.m, b.v, a.v); }
D23_FN Mask16 operator<(Float16 a, Float16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
D23_FN Mask16 operator<=(Float16 a, Float16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
D23_FN Mask16 operator>(Float16 a, Float16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
D23_FN Mask16 operator>=(Float16 a, Float16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
D23_FN Mask16 operator&(Mask16 a, Mask16 b) { return {static_cast<__mmask16>(a.m & b.m)}; }
D23_FN Mask16 andnot(Mask16 a, Mask16 b) { return {static_cast<__mmask16>(a.m & ~b.m)}; }
D23_FN bool any(Mask16 m) { return m.m != 0; }
// Lower plus upper half. (The maskz form, because GCC 12 warns of its own header behind the plain ones.)
D23_FN __m256 halves_added(Float16 a) {
  return _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, a.v, 0), _mm512_maskz_extractf32x8_ps(0xff, a.v, 1));
}
D23_FN Float16 exp2_(Float16 a) {
  const __m512 n = _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(a.v, n);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(D23_EXP2_C5), f, _mm512_set1_ps(D23_EXP2_C4));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(D23_EXP2_C3));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(D23_EXP2_C2));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(D23_EXP2_C1));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}
using FloatPack = Float16;

// ---------------------------------------------------------------- AVX2 + FMA: 8 floats
#elif defined(__AVX2__)
struct Mask8 {
  __m256 m;
};
struct Float8 {
  using Scalar = float;
  using Mask = Mask8;
  static constexpr int W = 8;
  __m256 v;

  Float8() = default;
  D23_FN Float8(__m256 x) : v(x) {}
  D23_FN Float8(float s) : v(_mm256_set1_ps(s)) {}
  static D23_FN Float8 load(const float* p) { return _mm256_loadu_ps(p); }
  D23_FN void store(float* p) const { _mm256_storeu_ps(p, v); }
};
D23_FN Float8 operator+(Float8 a, Float8 b) { return _mm256_add_ps(a.v, b.v); }
D23_FN Float8 operator-(Float8 a, Float8 b) { return _mm256_sub_ps(a.v, b.v); }
D23_FN Float8 operator*(Float8 a, Float8 b) { return _mm256_mul_ps(a.v, b.v); }
D23_FN Float8 operator/(Float8 a, Float8 b) { return _mm256_div_ps(a.v, b.v); }
D23_FN Float8 operator-(Float8 a) { return _mm256_sub_ps(_mm256_setzero_ps(), a.v); }
D23_FN Float8 fma_(Float8 a, Float8 b, Float8 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
D23_FN Float8 min_(Float8 a, Float8 b) { return _mm256_min_ps(a.v, b.v); }
D23_FN Float8 max_(Float8 a, Float8 b) { return _mm256_max_ps(a.v, b.v); }
D23_FN Float8 sqrt_(Float8 a) { return _mm256_sqrt_ps(a.v); }
D23_FN Float8 ceil_(Float8 a) { return _mm256_ceil_ps(a.v); }
D23_FN Float8 floor_(Float8 a) { return _mm256_floor_ps(a.v); }
D23_FN Float8 select(Mask8 m, Float8 a, Float8 b) { return _mm256_blendv_ps(b.v, a.v, m.m); }
D23_FN Mask8 operator<(Float8 a, Float8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
D23_FN Mask8 operator<=(Float8 a, Float8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
D23_FN Mask8 operator>(Float8 a, Float8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
D23_FN Mask8 operator>=(Float8 a, Float8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
D23_FN Mask8 operator&(Mask8 a, Mask8 b) { return {_mm256_and_ps(a.m, b.m)}; }
D23_FN Mask8 andnot(Mask8 a, Mask8 b) { return {_mm256_andnot_ps(b.m, a.m)}; }
D23_FN bool any(Mask8 m) { return _mm256_movemask_ps(m.m) != 0; }
D23_FN __m256 halves_added(Float8 a) { return a.v; }
D23_FN Float8 exp2_(Float8 a) {
  const __m256 x = _mm256_min_ps(_mm256_max_ps(a.v, _mm256_set1_ps(-126.0f)), _mm256_set1_ps(126.0f));
  const __m256i n = _mm256_cvtps_epi32(x);
  const __m256 f = _mm256_sub_ps(x, _mm256_cvtepi32_ps(n));
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(D23_EXP2_C5), f, _mm256_set1_ps(D23_EXP2_C4));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(D23_EXP2_C3));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(D23_EXP2_C2));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(D23_EXP2_C1));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  const __m256i scale = _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(scale));
}
using FloatPack = Float8;
#else
using FloatPack = GenericPack<float, 4>;
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
D23_FN float sum(FloatPack a) {
  const __m256 v = halves_added(a);
  const __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 q = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
// out[i] = sum of the lanes of a[i], eight packs together: a tree over pairs costs half of eight single sums.
D23_FN void sums(const FloatPack* a, int count, float* out) {
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    __m256 v[8];
    for (int k = 0; k < 8; ++k) v[k] = halves_added(a[i + k]);
    const __m256 u0 = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256 u1 = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    _mm256_storeu_ps(out + i,
                     _mm256_add_ps(_mm256_permute2f128_ps(u0, u1, 0x20), _mm256_permute2f128_ps(u0, u1, 0x31)));
  }
  for (; i < count; ++i) out[i] = sum(a[i]);
}
// Rarely on a hot path: once a Gaussian.
D23_FN FloatPack log2_(FloatPack a) {
  float lanes[FloatPack::W];
  a.store(lanes);
  for (float& x : lanes) x = std::log2(x);
  return FloatPack::load(lanes);
}
#endif

// Writes the indices i < count whose masks[i] has `bit` set, in order; returns how many. `out` has room for 16
// more than that, and `masks` for reading up to the next multiple of 16.
#if defined(__AVX512F__)
inline int indices_with_bit(const uint16_t* masks, int count, int bit, uint8_t* out) {
  const __m512i wanted = _mm512_set1_epi32(1 << bit), step = _mm512_set1_epi32(16);
  __m512i index = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int n = 0;
  for (int i = 0; i < count; i += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(masks + i));
    const uint32_t inside = count - i >= 16 ? 0xffffu : (1u << (count - i)) - 1;
    const __mmask16 m = _mm512_mask_test_epi32_mask(static_cast<__mmask16>(inside), _mm512_cvtepu16_epi32(half), wanted);
    const __m512i packed = _mm512_maskz_compress_epi32(m, index);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + n), _mm512_cvtepi32_epi8(packed));
    n += __builtin_popcount(m);
    index = _mm512_add_epi32(index, step);
  }
  return n;
}
#else
inline int indices_with_bit(const uint16_t* masks, int count, int bit, uint8_t* out) {
  int n = 0;
  for (int i = 0; i < count; ++i) {
    out[n] = static_cast<uint8_t>(i);
    n += masks[i] >> bit & 1;
  }
  return n;
}
#endif

template <class S>
struct PackOf;
template <>
struct PackOf<float> {
  using type = FloatPack;
};
template <>
struct PackOf<double> {
  using type = GenericPack<double, 1>;
};
template <class S>
using Pack = typename PackOf<S>::type;

}  // namespace d23
