// Vectors of W float32 lanes for the ISA a file is compiled for (PYMPA_ISA, PYMPA_ISA_LEVEL).
//
// GCC vector extensions are used for most of the code, and intrinsics only where the compiler does
// not reliably choose the instruction. Everything is in the ISA's namespace, and nothing from the
// C++ standard library is used: the linker would merge inline functions with the same name in two
// ISAs, and AVX-512 code could run on a CPU without it.
#pragma once

#include <stddef.h>
#include <stdint.h>

// PYMPA_ISA_LEVEL: 0 portable, 1 avx2, 2 avx512, 3 avx512_bf16, 4 amx_bf16. Code depends on it for
// its shape, and on PYMPA_INTRINSICS for the instructions that it may name: amx_emulated is of
// level 4 and names none.
#if PYMPA_EMULATED
#define PYMPA_INTRINSICS 0
#else
#define PYMPA_INTRINSICS PYMPA_ISA_LEVEL
#endif

#if PYMPA_INTRINSICS >= 1
#include <immintrin.h>
#endif

#include "core/dtype.hpp"

#if PYMPA_EMULATED
#define PYMPA_INLINE inline  // a model need not be fast, and compiles ten times as fast so
#else
#define PYMPA_INLINE inline __attribute__((always_inline))
#endif
#define PYMPA_NOINLINE __attribute__((noinline))

namespace pympa::PYMPA_ISA {

constexpr int W = PYMPA_ISA_LEVEL >= 2 ? 16 : PYMPA_ISA_LEVEL == 1 ? 8 : 4;

typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t VInt __attribute__((vector_size(W * 4)));
typedef uint32_t VBits __attribute__((vector_size(W * 4)));
typedef uint16_t VShort __attribute__((vector_size(W * 2)));
typedef uint16_t VShorts __attribute__((vector_size(W * 4)));
typedef uint64_t VLongs __attribute__((vector_size(W * 4)));

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// Not 0 + value: that would be an addition, since it turns -0 into 0.
PYMPA_INLINE V splat(float value) { return value - V{}; }

PYMPA_INLINE VBits bits_of(V x) { return reinterpret_cast<VBits>(x); }
PYMPA_INLINE V from_bits(VBits x) { return reinterpret_cast<V>(x); }

// Lane numbers 0..W-1.
PYMPA_INLINE VInt lane_index() {
  VInt lanes;
  for (int lane = 0; lane < W; ++lane) lanes[lane] = lane;
  return lanes;
}

// a*b + c, fused where the ISA can; spelled out so that the compiler has no choice.
PYMPA_INLINE V fma(V a, V b, V c) {
#if PYMPA_INTRINSICS >= 2
  return _mm512_fmadd_ps(a, b, c);
#elif PYMPA_INTRINSICS == 1
  return _mm256_fmadd_ps(a, b, c);
#elif PYMPA_EMULATED
  for (int lane = 0; lane < W; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return c;
#else
  return a * b + c;
#endif
}

// The larger of the two; `other` where either is NaN.
PYMPA_INLINE V max_or(V x, V other) {
#if PYMPA_INTRINSICS >= 2
  return _mm512_max_ps(x, other);
#elif PYMPA_INTRINSICS == 1
  return _mm256_max_ps(x, other);
#else
  return x > other ? x : other;
#endif
}

// The smaller of the two; `other` where either is NaN.
PYMPA_INLINE V min_or(V x, V other) {
#if PYMPA_INTRINSICS >= 2
  return _mm512_min_ps(x, other);
#elif PYMPA_INTRINSICS == 1
  return _mm256_min_ps(x, other);
#else
  return x < other ? x : other;
#endif
}

// Round to the nearest integer, ties to even; |x| < 2^22.
PYMPA_INLINE V round_to_integer(V x) {
#if PYMPA_INTRINSICS >= 2
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif PYMPA_INTRINSICS == 1
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction bits
  return (x + magic) - magic;
#endif
}

PYMPA_INLINE V sqrt(V x) {
#if PYMPA_INTRINSICS >= 2
  return _mm512_sqrt_ps(x);
#elif PYMPA_INTRINSICS == 1
  return _mm256_sqrt_ps(x);
#else
  for (int lane = 0; lane < W; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

// The lanes rotated down by `half`: lane i holds lane i + half.
PYMPA_INLINE V rotated(V x, int half) {
  return __builtin_shuffle(x, (lane_index() + half) & (W - 1));
}

// Horizontal sum by halving: a fixed order for each ISA.
PYMPA_INLINE float sum_lanes(V x) {
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2) x += rotated(x, half);
  return x[0];
}

PYMPA_INLINE float max_lanes(V x) {
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2) x = max_or(x, rotated(x, half));
  return x[0];
}

PYMPA_INLINE int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}
PYMPA_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
PYMPA_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace pympa::PYMPA_ISA
