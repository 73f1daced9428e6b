// Loads and stores between float32 lanes and the three storage types, for whole and partial
// vectors. Stores round to nearest, ties to even; NaN stays NaN.
#pragma once

#include "cpu/simd.hpp"

namespace pympa::PYMPA_ISA {

// W elements of 4 or 2 bytes at any address.
template <class Wide, class T>
PYMPA_INLINE Wide load_raw(const T* source) {
  Wide wide;
  __builtin_memcpy(&wide, source, sizeof wide);
  return wide;
}

// The first `count` < W elements; the other lanes are zero.
template <class Wide, class T>
PYMPA_INLINE Wide load_raw(const T* source, int64_t count) {
  static_assert(sizeof(Wide) == W * sizeof(T));
#if PYMPA_INTRINSICS >= 2
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Wide>(_mm512_maskz_loadu_epi32(mask, source));
  } else {
    return reinterpret_cast<Wide>(_mm256_maskz_loadu_epi16(mask, source));
  }
#else
  Wide wide{};
  __builtin_memcpy(&wide, source, static_cast<size_t>(count) * sizeof(T));
  return wide;
#endif
}

template <class Wide, class T>
PYMPA_INLINE void store_raw(T* target, Wide wide) {
  __builtin_memcpy(target, &wide, sizeof wide);
}

template <class Wide, class T>
PYMPA_INLINE void store_raw(T* target, Wide wide, int64_t count) {
  static_assert(sizeof(Wide) == W * sizeof(T));
#if PYMPA_INTRINSICS >= 2
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(target, mask, reinterpret_cast<__m512i>(wide));
  } else {
    _mm256_mask_storeu_epi16(target, mask, reinterpret_cast<__m256i>(wide));
  }
#else
  __builtin_memcpy(target, &wide, static_cast<size_t>(count) * sizeof(T));
#endif
}

// GCC splits __builtin_convertvector into half vectors here; the intrinsics are one instruction.
#if PYMPA_INTRINSICS >= 2
PYMPA_INLINE VBits widen(VShort x) {
  return reinterpret_cast<VBits>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)));
}
PYMPA_INLINE VShort narrow(VBits x) {
  return reinterpret_cast<VShort>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
}
#elif PYMPA_INTRINSICS == 1
PYMPA_INLINE VBits widen(VShort x) {
  return reinterpret_cast<VBits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
}
PYMPA_INLINE VShort narrow(VBits x) { return __builtin_convertvector(x, VShort); }
#else
PYMPA_INLINE VBits widen(VShort x) { return __builtin_convertvector(x, VBits); }
PYMPA_INLINE VShort narrow(VBits x) { return __builtin_convertvector(x, VShort); }
#endif

PYMPA_INLINE V bfloat_to_float(VShort x) { return from_bits(widen(x) << 16); }

PYMPA_INLINE VShort float_to_bfloat(V x) {
  const VBits bits = bits_of(x);
  const VBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return narrow(x == x ? rounded : ((bits >> 16) | 0x40u));
}

#if PYMPA_INTRINSICS >= 2
PYMPA_INLINE V half_to_float(VShort x) { return _mm512_cvtph_ps(reinterpret_cast<__m256i>(x)); }
PYMPA_INLINE VShort float_to_half(V x) {
  return reinterpret_cast<VShort>(
      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif PYMPA_INTRINSICS == 1
PYMPA_INLINE V half_to_float(VShort x) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(x)); }
PYMPA_INLINE VShort float_to_half(V x) {
  return reinterpret_cast<VShort>(
      _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
PYMPA_INLINE V half_to_float(VShort x) {
  const VBits half = widen(x);
  const VBits magnitude = (half & 0x7fffu) << 13;
  // Scaling by 2^112 moves the exponent bias from 15 to 127, and is exact for subnormals too.
  const V scaled = from_bits(magnitude) * from_bits(VBits{} + 0x77800000u);
  const VBits bits = (half & 0x7fffu) >= 0x7c00u ? (magnitude | 0x7f800000u) : bits_of(scaled);
  return from_bits(bits | ((half & 0x8000u) << 16));
}

PYMPA_INLINE VShort float_to_half(V x) {
  const VBits bits = bits_of(x);
  const VBits magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 leaves exactly its 10 bits, rounded.
  const VBits half_one = bits_of(splat(0.5f));
  const VBits subnormal = bits_of(from_bits(magnitude) + splat(0.5f)) - half_one;
  const VBits normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const VBits special = magnitude > 0x7f800000u ? VBits{} + 0x7e00u : VBits{} + 0x7c00u;
  VBits result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? special : result;
  return narrow(result | ((bits >> 16) & 0x8000u));
}
#endif

// Elements of T as float32.
template <class T>
PYMPA_INLINE V widen_as(VShort x) {
  if constexpr (__is_same(T, Half)) {
    return half_to_float(x);
  } else {
    return bfloat_to_float(x);
  }
}

PYMPA_INLINE V load(const float* source) { return load_raw<V>(source); }
PYMPA_INLINE V load(const Half* source) { return half_to_float(load_raw<VShort>(source)); }
PYMPA_INLINE V load(const BFloat* source) { return bfloat_to_float(load_raw<VShort>(source)); }

PYMPA_INLINE void store(float* target, V x) { store_raw(target, x); }
PYMPA_INLINE void store(Half* target, V x) { store_raw(target, float_to_half(x)); }
PYMPA_INLINE void store(BFloat* target, V x) { store_raw(target, float_to_bfloat(x)); }

// The first min(count, W) elements; count may exceed W, so a loop needs no separate tail.
PYMPA_INLINE V load(const float* source, int64_t count) {
  return count >= W ? load(source) : load_raw<V>(source, count);
}
PYMPA_INLINE V load(const Half* source, int64_t count) {
  return count >= W ? load(source) : half_to_float(load_raw<VShort>(source, count));
}
PYMPA_INLINE V load(const BFloat* source, int64_t count) {
  return count >= W ? load(source) : bfloat_to_float(load_raw<VShort>(source, count));
}
PYMPA_INLINE void store(float* target, V x, int64_t count) {
  count >= W ? store_raw(target, x) : store_raw(target, x, count);
}
PYMPA_INLINE void store(Half* target, V x, int64_t count) {
  const VShort half = float_to_half(x);
  count >= W ? store_raw(target, half) : store_raw(target, half, count);
}
PYMPA_INLINE void store(BFloat* target, V x, int64_t count) {
  const VShort rounded = float_to_bfloat(x);
  count >= W ? store_raw(target, rounded) : store_raw(target, rounded, count);
}

// Lanes rounded to T's precision, kept as float32.
PYMPA_INLINE V round_to(V x, const float*) { return x; }
PYMPA_INLINE V round_to(V x, const Half*) { return half_to_float(float_to_half(x)); }
PYMPA_INLINE V round_to(V x, const BFloat*) { return bfloat_to_float(float_to_bfloat(x)); }
template <class T>
PYMPA_INLINE V round_to(V x) {
  return round_to(x, static_cast<const T*>(nullptr));
}

// Whether NaN or infinity is among what it looked at: one more in the last place of an exponent of
// all ones is a carry into the sign's place.
template <class T>
class SpecialValues {
 public:
  PYMPA_INLINE void look_at(const T* x, int64_t count) {
    constexpr int64_t kStep = sizeof(VBits) / sizeof(T);
    for (int64_t i = 0; i < count; i += kStep) {
      VBits bits{};
      if (count - i >= kStep) {
        bits = load_raw<VBits>(x + i);
      } else {
        __builtin_memcpy(&bits, x + i, static_cast<size_t>(count - i) * sizeof(T));
      }
      carries_ |= (bits & kExponent) + kOne;
    }
  }

  PYMPA_INLINE bool found() const {
    uint32_t any = 0;
    for (int lane = 0; lane < W; ++lane) any |= carries_[lane];
    return (any & kSign) != 0;
  }

 private:
  // Of one element, or of two neighbours.
  static constexpr uint32_t kExponent = __is_same(T, float)  ? 0x7f800000u
                                        : __is_same(T, Half) ? 0x7c007c00u
                                                             : 0x7f807f80u;
  static constexpr uint32_t kSign = sizeof(T) == 4 ? 0x80000000u : 0x80008000u;
  static constexpr uint32_t kOne = kSign - kExponent;

  VBits carries_{};
};

// Calls body.template operator()<T>() with the storage type of a float dtype; one for which this
// ISA has kernels of its own (`isa_for`). `kAsFloat` is false where float32 has none.
template <bool kAsFloat = true, class Body>
PYMPA_INLINE void with_type([[maybe_unused]] DType dtype, Body&& body) {
#if PYMPA_ISA_LEVEL != 3
  if constexpr (kAsFloat) {
    if (dtype == DType::kFloat32) return body.template operator()<float>();
  }
  if (dtype == DType::kFloat16) return body.template operator()<Half>();
#endif
  body.template operator()<BFloat>();
}

}  // namespace pympa::PYMPA_ISA
