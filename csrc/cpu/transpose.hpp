// Transposes W rows of a matrix in registers: rows become lanes, for packing panels and for scores
// of streamed keys.
#pragma once

#include "cpu/tile.hpp"

namespace pympa::PYMPA_ISA {

// The low (or high) half of each 128-bit lane of a and b, interleaved by elements of `Elements`:
// one cheap shuffle on x86.
template <class Elements, bool kHigh, class Lanes>
PYMPA_INLINE Lanes interleave(Lanes a, Lanes b) {
  Elements from;
  constexpr int kCount = sizeof(from) / sizeof(from[0]), kLane = 16 / sizeof(from[0]);
  for (int i = 0; i < kCount; ++i) {
    const int of_a = i / kLane * kLane + (kHigh ? kLane / 2 : 0) + i % kLane / 2;
    from[i] = static_cast<decltype(+from[0])>(of_a + i % 2 * kCount);
  }
  return reinterpret_cast<Lanes>(
      __builtin_shuffle(reinterpret_cast<Elements>(a), reinterpret_cast<Elements>(b), from));
}

// Every second 128-bit lane of a, then of b, from the first or the second one on.
template <bool kOdd, class Lanes>
PYMPA_INLINE Lanes every_second(Lanes a, Lanes b) {
  constexpr int kCount = sizeof(Lanes) / sizeof(a[0]), kLane = 16 / sizeof(a[0]);
  Lanes from;
  for (int i = 0; i < kCount; ++i) {
    from[i] = static_cast<decltype(+from[0])>((i / kLane * 2 + kOdd) * kLane + i % kLane);
  }
  return __builtin_shuffle(a, b, from);
}

// W x W elements of 32 bits: 4 x 4 inside 128-bit lanes, then those lanes.
PYMPA_INLINE void transpose(VBits (&rows)[W]) {
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) {
    const VBits a = interleave<VBits, false>(rows[i], rows[i + 1]);
    const VBits b = interleave<VBits, true>(rows[i], rows[i + 1]);
    const VBits c = interleave<VBits, false>(rows[i + 2], rows[i + 3]);
    const VBits d = interleave<VBits, true>(rows[i + 2], rows[i + 3]);
    rows[i] = interleave<VLongs, false>(a, c);
    rows[i + 1] = interleave<VLongs, true>(a, c);
    rows[i + 2] = interleave<VLongs, false>(b, d);
    rows[i + 3] = interleave<VLongs, true>(b, d);
  }
#if PYMPA_ISA_LEVEL >= 2
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const VBits a = every_second<false>(rows[i], rows[i + 4]);
    const VBits b = every_second<true>(rows[i], rows[i + 4]);
    const VBits c = every_second<false>(rows[i + 8], rows[i + 12]);
    const VBits d = every_second<true>(rows[i + 8], rows[i + 12]);
    rows[i] = every_second<false>(a, c);
    rows[i + 4] = every_second<false>(b, d);
    rows[i + 8] = every_second<true>(a, c);
    rows[i + 12] = every_second<true>(b, d);
  }
#elif PYMPA_ISA_LEVEL == 1
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const VBits low = every_second<false>(rows[i], rows[i + 4]);
    rows[i + 4] = every_second<true>(rows[i], rows[i + 4]);
    rows[i] = low;
  }
#endif
}

// Groups of W source rows (keys, or a weight's outputs) in registers, rows as lanes. Rows outside
// [first, last) and what lies beyond `length` read as zero; a whole block has nothing of either.
template <class Math, class T>
struct Transposed {
  static constexpr int kGroups = W;
  VBits rows[W];

  template <bool kWhole>
  PYMPA_INLINE void load(const T* source, int64_t row_stride, int64_t first, int64_t last,
                         int64_t length) {
#pragma GCC unroll 16
    for (int row = 0; row < W; ++row) {
      const T* at = source + row * row_stride;
      rows[row] = VBits{};
      if (!kWhole && (row < first || row >= last)) continue;
      if constexpr (Math::kDepth == 1) {
        rows[row] = bits_of(kWhole ? PYMPA_ISA::load(at) : PYMPA_ISA::load(at, length));
      } else if (kWhole || length >= 2 * W) {
        rows[row] = load_raw<VBits>(reinterpret_cast<const uint32_t*>(at));
      } else {
        __builtin_memcpy(&rows[row], at, static_cast<size_t>(length) * sizeof(T));
      }
    }
    transpose(rows);
  }

  PYMPA_INLINE typename Math::Lanes lanes(int group) const {
    if constexpr (Math::kDepth == 1) {
      return from_bits(rows[group]);
    } else {
      return rows[group];
    }
  }
};

#if PYMPA_ISA_LEVEL >= 2
// 16 rows of 32 elements of 16 bits: register i gets columns i / 8 * 16 + i % 8 and that + 8, each
// as 16 elements with the rows in order.
PYMPA_INLINE void transpose(VShorts (&rows)[W]) {
#pragma GCC unroll 2
  for (int i = 0; i < W; i += 8) {
    VShorts x[8];
#pragma GCC unroll 4
    for (int r = 0; r < 8; r += 2) {
      x[r] = interleave<VShorts, false>(rows[i + r], rows[i + r + 1]);
      x[r + 1] = interleave<VShorts, true>(rows[i + r], rows[i + r + 1]);
    }
    VShorts y[8];
#pragma GCC unroll 2
    for (int r = 0; r < 8; r += 4) {
      y[r] = interleave<VBits, false>(x[r], x[r + 2]);
      y[r + 1] = interleave<VBits, true>(x[r], x[r + 2]);
      y[r + 2] = interleave<VBits, false>(x[r + 1], x[r + 3]);
      y[r + 3] = interleave<VBits, true>(x[r + 1], x[r + 3]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      rows[i + 2 * r] = interleave<VLongs, false>(y[r], y[r + 4]);
      rows[i + 2 * r + 1] = interleave<VLongs, true>(y[r], y[r + 4]);
    }
  }
  constexpr VLongs kLow = {0, 1, 8, 9, 2, 3, 10, 11}, kHigh = {4, 5, 12, 13, 6, 7, 14, 15};
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const VLongs a = reinterpret_cast<VLongs>(rows[i]), b = reinterpret_cast<VLongs>(rows[i + 8]);
    rows[i] = reinterpret_cast<VShorts>(__builtin_shuffle(a, b, kLow));
    rows[i + 8] = reinterpret_cast<VShorts>(__builtin_shuffle(a, b, kHigh));
  }
}

// 16-bit elements are transposed as they are, which halves the shuffles, and widened after it.
template <class Math, class T>
  requires(Math::kDepth == 1 && sizeof(T) == 2)
struct Transposed<Math, T> {
  static constexpr int kGroups = 2 * W;
  VShorts rows[W];

  template <bool kWhole>
  PYMPA_INLINE void load(const T* source, int64_t row_stride, int64_t first, int64_t last,
                         int64_t length) {
#pragma GCC unroll 16
    for (int row = 0; row < W; ++row) {
      const T* at = source + row * row_stride;
      rows[row] = VShorts{};
      if (!kWhole && (row < first || row >= last)) continue;
      if (kWhole || length >= kGroups) {
        rows[row] = load_raw<VShorts>(reinterpret_cast<const uint16_t*>(at));
      } else {
        __builtin_memcpy(&rows[row], at, static_cast<size_t>(length) * sizeof(T));
      }
    }
    transpose(rows);
  }

  PYMPA_INLINE V lanes(int group) const {
    const VShorts both = rows[group / 16 * 8 + group % 8];
#if PYMPA_INTRINSICS >= 2
    const __m512i bits = reinterpret_cast<__m512i>(both);
    const VShort half = reinterpret_cast<VShort>(group / 8 % 2 ? _mm512_extracti64x4_epi64(bits, 1)
                                                               : _mm512_castsi512_si256(bits));
#else
    VShort half;
    for (int lane = 0; lane < W; ++lane) half[lane] = both[lane + group / 8 % 2 * W];
#endif
    return widen_as<T>(half);
  }
};
#endif

}  // namespace pympa::PYMPA_ISA
