// The only matrix product of this package, for linear layers and both products of attention.
//
//   A rows [mr, groups] (row stride in groups) x B panel [groups, kPanel] -> C [mr, nv * W]
//
// A group is one float32, or a pair of bfloat16 for vdpbf16ps. Each C element is one sum, started
// at zero, over the groups in ascending order, for any mr and nv: tails change speed, never bits.
#pragma once

#include "cpu/convert.hpp"

namespace pympa::PYMPA_ISA {

// 6 x 4 accumulators + 4 B + 1 A fill 29 of 32 AVX-512 registers; 6 x 2 + 2 + 1 fill 15 of 16.
constexpr int kStrip = 6;
// Tiles of AMX are as wide as one vector, and go in twos.
constexpr int kPanelVectors = PYMPA_ISA_LEVEL == 2 || PYMPA_ISA_LEVEL == 3 ? 4 : 2;
constexpr int kPanel = kPanelVectors * W;

// float32 arithmetic on panels stored as T.
template <class T>
struct FloatMath {
  using Group = float;
  using Stored = T;
  using Lanes = V;
  static constexpr int kDepth = 1;
  static constexpr int kStep = 1;  // a panel has a multiple of so many groups
  static constexpr bool kWidens = sizeof(T) < sizeof(float);
  static PYMPA_INLINE V load_b(const Stored* b) { return load(b); }
  static PYMPA_INLINE void store_b(Stored* b, Lanes lanes) { store(b, lanes); }
  static PYMPA_INLINE V broadcast(const Group* a) { return splat(*a); }
  static PYMPA_INLINE V dot(V c, V a, V b) { return fma(a, b, c); }
};

#if PYMPA_ISA_LEVEL >= 3
// Pairs of bfloat16, of which a step adds two products.
struct PairMath {
  using Group = uint32_t;
  using Stored = uint32_t;
  using Lanes = VBits;
  static constexpr int kDepth = 2;
  static constexpr int kStep = PYMPA_ISA_LEVEL == 4 ? 16 : 1;
  static constexpr bool kWidens = false;
  static PYMPA_INLINE void store_b(Stored* b, Lanes lanes) { store_raw(b, lanes); }
#if PYMPA_ISA_LEVEL == 3
  static PYMPA_INLINE VBits load_b(const Stored* b) { return load_raw<VBits>(b); }
  static PYMPA_INLINE VBits broadcast(const Group* a) { return VBits{} + *a; }
  static PYMPA_INLINE V dot(V c, VBits a, VBits b) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
#endif
};
#endif

// Linear layers keep weights in their storage type; attention widens K and V once when packing.
template <class T>
struct MathOf {
  using Linear = FloatMath<T>;
  using Attention = FloatMath<float>;
};
#if PYMPA_ISA_LEVEL >= 3
template <>
struct MathOf<BFloat> {
  using Linear = PairMath;
  using Attention = PairMath;
};
#endif

// consume(row, vector, sums) receives the C tile from registers.
template <class Math, int kRows, int kVectors, class Consume>
PYMPA_INLINE void tile(const typename Math::Group* a, int64_t a_stride,
                       const typename Math::Stored* b, int64_t groups, Consume&& consume) {
  V c[kRows][kVectors] = {};
  for (int64_t group = 0; group < groups; ++group) {
    typename Math::Lanes b_lanes[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b_lanes[v] = Math::load_b(b + group * kPanel + v * W);
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      const auto a_lanes = Math::broadcast(a + row * a_stride + group);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) c[row][v] = Math::dot(c[row][v], a_lanes, b_lanes[v]);
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) consume(row, v, c[row][v]);
  }
}

template <class Math, int kRows, class Consume>
PYMPA_INLINE void tile_of_rows(int vectors, const typename Math::Group* a, int64_t a_stride,
                               const typename Math::Stored* b, int64_t groups, Consume&& consume) {
  if constexpr (kPanelVectors == 4) {
    if (vectors == 4) return tile<Math, kRows, 4>(a, a_stride, b, groups, consume);
    if (vectors == 3) return tile<Math, kRows, 3>(a, a_stride, b, groups, consume);
  }
  if (vectors == 2) return tile<Math, kRows, 2>(a, a_stride, b, groups, consume);
  return tile<Math, kRows, 1>(a, a_stride, b, groups, consume);
}

// C tile of `rows` <= kStrip and `vectors` <= kPanelVectors.
template <class Math, class Consume>
PYMPA_INLINE void any_tile(int rows, int vectors, const typename Math::Group* a, int64_t a_stride,
                           const typename Math::Stored* b, int64_t groups, Consume&& consume) {
  switch (rows) {
    case 1:
      return tile_of_rows<Math, 1>(vectors, a, a_stride, b, groups, consume);
    case 2:
      return tile_of_rows<Math, 2>(vectors, a, a_stride, b, groups, consume);
    case 3:
      return tile_of_rows<Math, 3>(vectors, a, a_stride, b, groups, consume);
    case 4:
      return tile_of_rows<Math, 4>(vectors, a, a_stride, b, groups, consume);
    case 5:
      return tile_of_rows<Math, 5>(vectors, a, a_stride, b, groups, consume);
    default:
      return tile_of_rows<Math, kStrip>(vectors, a, a_stride, b, groups, consume);
  }
}

}  // namespace pympa::PYMPA_ISA
