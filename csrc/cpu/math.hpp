// Elementary functions on float32 lanes, accurate to a few units in the last place.
//
// The polynomials are weighted minimax fits made for this file (relative errors: exp 3e-9, tanh
// 4e-9, scaled erfc 3e-8, before rounding). A NaN input gives a NaN output: no clamp removes it.
#pragma once

#include "cpu/simd.hpp"

namespace pympa::PYMPA_ISA {

constexpr float kInfinity = __builtin_inff();

#if PYMPA_ISA_LEVEL >= 2
// x times 2^n for integers n, rounded once.
PYMPA_INLINE V scaled(V x, V n) {
#if PYMPA_INTRINSICS >= 2
  return _mm512_scalef_ps(x, n);
#else
  for (int lane = 0; lane < W; ++lane) {
    const float power = n[lane] < -300.0f ? -300.0f : n[lane] > 300.0f ? 300.0f : n[lane];
    x[lane] = power == power ? __builtin_ldexpf(x[lane], static_cast<int>(power)) : power;
  }
  return x;
#endif
}
#endif

#if PYMPA_ISA_LEVEL == 4
// x less the nearest integer, ties to even; 0 for an infinity.
PYMPA_INLINE V beyond_integer(V x) {
#if PYMPA_INTRINSICS >= 2
  return _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int lane = 0; lane < W; ++lane) {
    x[lane] = x[lane] - x[lane] == 0.0f || x[lane] != x[lane]
                  ? x[lane] - __builtin_nearbyintf(x[lane])
                  : 0.0f;
  }
  return x;
#endif
}

// exp(x) for results that are then rounded to 16 bits, with a relative error of 7e-6 (3e-6 near 0).
// It takes 9 instructions where exp takes 15.
//
// 2^n * 2^f with n = round(x / ln 2) and |f| <= 1/2. exp(0) is exactly 1, exp(-inf) is 0.
template <int kCount>
PYMPA_INLINE void exp_for_16_bits(V (&x)[kCount]) {
  constexpr float kCoefficients[] = {0.0559064262f, 0.240240991f, 0.693124175f, 1.0f};
  V f[kCount], p[kCount];
  for (int i = 0; i < kCount; ++i) x[i] *= splat(1.44269504f);
  for (int i = 0; i < kCount; ++i) f[i] = beyond_integer(x[i]);
  for (int i = 0; i < kCount; ++i) p[i] = splat(0.00958285294f);
  for (float coefficient : kCoefficients) {
    for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], f[i], splat(coefficient));
  }
  for (int i = 0; i < kCount; ++i) x[i] = scaled(p[i], x[i] - f[i]);
}
#endif

// exp(x) = 2^n * exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2; exp(0) is exactly 1.
//
// kCount vectors advance together, stage by stage: one vector's chain of dependent steps is so long
// that a few of them in a row would fill the core's scheduler and leave its units idle.
template <int kCount>
PYMPA_INLINE void exp(V (&x)[kCount]) {
  constexpr float kCoefficients[] = {0.00836871658f, 0.0416683890f, 0.166665211f,
                                     0.49999994f,    1.0f,          1.0f};
#if PYMPA_ISA_LEVEL >= 2
  // vscalefps rounds results below the normal range itself; the clamps only keep n finite.
  const V low = splat(-110.0f), high = splat(90.0f);
#else
  const V low = splat(-87.33654f), high = splat(88.72283f);
#endif
  V z[kCount], n[kCount], p[kCount];
  for (int i = 0; i < kCount; ++i) z[i] = min_or(high, max_or(low, x[i]));
  for (int i = 0; i < kCount; ++i) n[i] = round_to_integer(z[i] * splat(1.44269504f));
  for (int i = 0; i < kCount; ++i) p[i] = splat(0.00138146011f);
  V r[kCount];
  for (int i = 0; i < kCount; ++i) r[i] = fma(n[i], splat(-0.693359375f), z[i]);
  for (int i = 0; i < kCount; ++i) r[i] = fma(n[i], splat(2.12194440e-4f), r[i]);
  for (float coefficient : kCoefficients) {
    for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], r[i], splat(coefficient));
  }
  for (int i = 0; i < kCount; ++i) {
#if PYMPA_ISA_LEVEL >= 2
    x[i] = scaled(p[i], n[i]);
#else
    // Two steps, since 2^128 alone is not a float; the results below 2^-126 are taken as zero.
    const VInt exponent = __builtin_convertvector(z[i] == z[i] ? n[i] : V{}, VInt);
    const VInt first = exponent >> 1;
    const V scale_a = reinterpret_cast<V>((first + 127) << 23);
    const V scale_b = reinterpret_cast<V>((exponent - first + 127) << 23);
    const V y = p[i] * scale_a * scale_b;
    x[i] = x[i] < low ? V{} : (x[i] > high ? splat(kInfinity) : y);
#endif
  }
}

PYMPA_INLINE V exp(V x) {
  V one[1] = {x};
  exp(one);
  return one[0];
}

// Natural logarithm of normal positive x: log(2^e * m) = e ln 2 + 2 atanh((m-1)/(m+1)).
PYMPA_INLINE V log(V x) {
  // Taking sqrt(1/2)'s bits off first centres m on 1: m in [sqrt(1/2), sqrt(2)).
  const VInt shifted = reinterpret_cast<VInt>(x) - 0x3f3504f3;
  const V e = __builtin_convertvector(shifted >> 23, V);
  const V m = reinterpret_cast<V>((shifted & 0x7fffff) + 0x3f3504f3);
  const V s = (m - splat(1.0f)) / (m + splat(1.0f));
  const V z = s * s;
  V p = splat(2.0f / 9.0f);
  p = fma(p, z, splat(2.0f / 7.0f));
  p = fma(p, z, splat(2.0f / 5.0f));
  p = fma(p, z, splat(2.0f / 3.0f));
  const V y = fma(p * z, s, s + s);
  const V result = fma(e, splat(0.693359375f), fma(e, splat(-2.12194440e-4f), y));
  return x == x ? result : x;
}

// tanh by an odd polynomial near 0 (no cancellation), by exp elsewhere.
PYMPA_INLINE V tanh(V x) {
  const V z = x * x;
  V p = splat(-0.00571704376f);
  p = fma(p, z, splat(0.0206505861f));
  p = fma(p, z, splat(-0.0537434965f));
  p = fma(p, z, splat(0.133314908f));
  p = fma(p, z, splat(-0.333332837f));
  const V near = fma(p * z, x, x);
  const V far = splat(1.0f) - splat(2.0f) / (exp(x + x) + splat(1.0f));
  return z < splat(0.390625f) ? near : far;
}

PYMPA_INLINE V sigmoid(V x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

PYMPA_INLINE V silu(V x) { return x / (splat(1.0f) + exp(-x)); }

// x Phi(x) through erfc(|x| / sqrt 2), so that the negative tail keeps its relative accuracy.
PYMPA_INLINE V gelu(V x) {
  const V magnitude = from_bits(bits_of(x) & 0x7fffffffu);
  const V z = magnitude * splat(0.707106781f);
  const V t = splat(1.0f) / fma(splat(0.5f), z, splat(1.0f));
  V p = splat(-0.0550512932f);
  p = fma(p, t, splat(0.263903111f));
  p = fma(p, t, splat(-0.441477716f));
  p = fma(p, t, splat(0.221191108f));
  p = fma(p, t, splat(0.0170775335f));
  p = fma(p, t, splat(0.181249956f));
  p = fma(p, t, splat(0.249793470f));
  p = fma(p, t, splat(0.281098425f));
  p = fma(p, t, splat(0.282221377f));
  p = fma(p, t, splat(-6.01128204e-6f));
  const V upper_tail = splat(0.5f) * p * exp(splat(-0.5f) * x * x);  // Phi(-|x|)
  return x * (x > V{} ? splat(1.0f) - upper_tail : upper_tail);
}

// 0.5 x (1 + tanh u) = x / (1 + exp(-2u)): the same value without cancellation.
PYMPA_INLINE V gelu_tanh(V x) {
  const V u = splat(0.797884561f) * fma(splat(0.044715f) * x * x, x, x);
  return x / (splat(1.0f) + exp(splat(-2.0f) * u));
}

// g sigmoid(alpha g) (u + 1) with g = min(gate, limit) and u = up within +-limit.
PYMPA_INLINE V swiglu_clamped(V gate, V up, V limit, V alpha) {
  const V g = min_or(limit, gate);
  const V u = max_or(-limit, min_or(limit, up));
  return g / (splat(1.0f) + exp(-alpha * g)) * (u + splat(1.0f));
}

}  // namespace pympa::PYMPA_ISA
