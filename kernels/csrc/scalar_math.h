// The few functions that arithmetic shared by the CPU and CUDA kernels may call, for plain numbers. The CPU's
// packs (cpu/simd.h) have functions of the same names.
#pragma once

#include <cmath>

#include "portable.h"

namespace d23 {

D23_FN float sqrt_(float a) { return sqrtf(a); }
D23_FN double sqrt_(double a) { return sqrt(a); }
D23_FN float log2_(float a) { return log2f(a); }
D23_FN double log2_(double a) { return log2(a); }
D23_FN float exp2_(float a) { return exp2f(a); }
D23_FN double exp2_(double a) { return exp2(a); }
D23_FN float ceil_(float a) { return ceilf(a); }
D23_FN double ceil_(double a) { return ceil(a); }
D23_FN float floor_(float a) { return floorf(a); }
D23_FN double floor_(double a) { return floor(a); }
D23_FN float min_(float a, float b) { return a < b ? a : b; }
D23_FN double min_(double a, double b) { return a < b ? a : b; }
D23_FN float max_(float a, float b) { return a > b ? a : b; }
D23_FN double max_(double a, double b) { return a > b ? a : b; }
D23_FN float fma_(float a, float b, float c) { return fmaf(a, b, c); }
D23_FN double fma_(double a, double b, double c) { return fma(a, b, c); }
D23_FN float select(bool m, float a, float b) { return m ? a : b; }
D23_FN double select(bool m, double a, double b) { return m ? a : b; }

// The scalar type and the mask type behind a number or a pack.
template <class R>
struct Traits {
  using Scalar = typename R::Scalar;
  using Mask = typename R::Mask;
};
template <>
struct Traits<float> {
  using Scalar = float;
  using Mask = bool;
};
template <>
struct Traits<double> {
  using Scalar = double;
  using Mask = bool;
};

}  // namespace d23
