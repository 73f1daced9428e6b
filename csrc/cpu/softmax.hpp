// One row of one key tile: scaled scores become probabilities, and the row's running maximum and
// sum are updated (the online softmax of Milakov & Gimelshein, 2018; tiled as in FlashAttention,
// Dao et al., 2022).
#pragma once

#include "cpu/math.hpp"
#if PYMPA_ISA_LEVEL == 4
#include "cpu/amx_split.hpp"
#endif
#include "cpu/tile.hpp"

namespace pympa::PYMPA_ISA {

// Vectors of scores that go through exp side by side: as many as the registers carry.
constexpr int kTogether = PYMPA_ISA_LEVEL >= 2 ? 4 : 2;

// Offsets [first, last) into a key tile; empty if last <= first.
struct Span {
  int64_t first, last;
};

// Lanes of the vector at `offset` that lie outside `visible` become -inf.
PYMPA_INLINE V mask_outside(V x, int64_t offset, Span visible) {
  const VInt lane = lane_index();
  const int first = static_cast<int>(visible.first - offset);
  const int last = static_cast<int>(visible.last - offset);
  x = lane < first ? splat(-kInfinity) : x;
  return lane >= last ? splat(-kInfinity) : x;
}

// How probabilities of T are rounded, stored for a product in place of scores, and summed as
// rounded: kVectors vectors of lanes at a time, at offsets that are multiples of kVectors * W.
template <class T>
struct Probabilities {
  static constexpr int kVectors = 1;
  static PYMPA_INLINE void store_and_sum(float* row, int64_t offset, const V* p, V& sums) {
    const V rounded = round_to<T>(*p);
    store(row + offset, rounded);
    sums += rounded;
  }
};

#if PYMPA_ISA_LEVEL >= 3
// 32 bfloat16 in order; subnormal ones become zero.
PYMPA_INLINE VBits rounded_pairs(V first, V second) {
#if PYMPA_INTRINSICS >= 3
  return reinterpret_cast<VBits>(_mm512_cvtne2ps_pbh(second, first));
#else
  const V x[2] = {first, second};
  VShorts rounded;
  for (int i = 0; i < 2; ++i) {
    const VBits bits = bits_of(x[i]);
    const VShort half = float_to_bfloat((bits & 0x7f800000u) == 0 ? V{} : x[i]);
    for (int lane = 0; lane < W; ++lane) rounded[i * W + lane] = half[lane];
  }
  return reinterpret_cast<VBits>(rounded);
#endif
}

template <>
struct Probabilities<BFloat> {
  static constexpr int kVectors = 2;
  static PYMPA_INLINE void store_and_sum(float* row, int64_t offset, const V* p, V& sums) {
    const VBits pairs = rounded_pairs(p[0], p[1]);
    store_raw(reinterpret_cast<uint32_t*>(row) + offset / 2, pairs);
#if PYMPA_ISA_LEVEL == 3
    // One product with ones adds 32 of them.
    const VBits ones = VBits{} + 0x3f803f80u;
    sums =
        _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(pairs), reinterpret_cast<__m512bh>(ones));
#else
    sums += from_bits(pairs << 16);
    sums += from_bits(pairs & 0xffff0000u);
#endif
  }
};
#endif

#if PYMPA_ISA_LEVEL == 4
// A line of leading pieces and a line of the rest: exact, since a float16 has 11 bits.
template <>
struct Probabilities<Half> {
  static constexpr int kVectors = 2;
  static PYMPA_INLINE void store_and_sum(float* row, int64_t offset, const V* p, V& sums) {
    V first[2], second[2];
    for (int i = 0; i < 2; ++i) {
      const V rounded = round_to<Half>(p[i]);
      sums += rounded;
      V pieces[2];
      split<Half>(rounded, pieces);
      first[i] = pieces[0];
      second[i] = pieces[1];
    }
    store_raw(reinterpret_cast<uint16_t*>(row + offset), joined(first[0], first[1]));
    store_raw(reinterpret_cast<uint16_t*>(row + offset + W), joined(second[0], second[1]));
  }
};
#endif

// Scales, caps and masks the scores of `visible` in place; returns their maximum. A NaN score is
// passed over here and comes back as a NaN probability.
template <bool kCapped, int kStep>
PYMPA_INLINE float scale_scores(float* scores, Span visible, float scale, float softcap) {
  const V inverse_cap = splat(kCapped ? 1.0f / softcap : 0.0f);
  V largest = splat(-kInfinity);
  const int64_t end = round_up(visible.last, kStep);
  for (int64_t i = visible.first / kStep * kStep; i < end; i += W) {
    V x = load(scores + i) * splat(scale);
    if constexpr (kCapped) x = splat(softcap) * tanh(x * inverse_cap);
    if (i < visible.first || i + W > visible.last) x = mask_outside(x, i, visible);
    store(scores + i, x);
    largest = max_or(x, largest);
  }
  return max_lanes(largest);
}

// Largest score of one row, which is then ready for `fold_row`; -inf if it sees no key.
template <class T>
PYMPA_INLINE float prepare_row(float* scores, Span visible, float scale, float softcap) {
  constexpr int kStep = Probabilities<T>::kVectors * W;
  if (visible.last <= visible.first) return -kInfinity;
  return softcap > 0.0f ? scale_scores<true, kStep>(scores, visible, scale, softcap)
                        : scale_scores<false, kStep>(scores, visible, scale, softcap);
}

// Probabilities of kCount steps of prepared scores from offset `at` on, in place.
template <class T, int kCount>
PYMPA_INLINE void exponentials(float* scores, int64_t at, V shift, V& sums) {
  constexpr int kVectors = Probabilities<T>::kVectors;
  V p[kCount * kVectors];
  for (int v = 0; v < kCount * kVectors; ++v) p[v] = load(scores + at + v * W) - shift;
#if PYMPA_ISA_LEVEL == 4
  sizeof(T) == 2 ? exp_for_16_bits(p) : exp(p);
#else
  exp(p);
#endif
  for (int v = 0; v < kCount * kVectors; v += kVectors) {
    Probabilities<T>::store_and_sum(scores, at + v * W, p + v, sums);
  }
}

// Replaces the prepared scores of one row by probabilities, in place, zero in `needed` outside
// `visible`. Returns the factor by which the row's earlier output is to be rescaled.
//
// Each lane sums the keys at its own absolute offset in ascending order, so row_sum depends neither
// on the other rows of the call nor on masked keys.
template <class T>
PYMPA_INLINE float fold_row(float* scores, Span visible, Span needed, float tile_max,
                            float& row_max, float& row_sum) {
  constexpr int kVectors = Probabilities<T>::kVectors;
  constexpr int kStep = kVectors * W;
  const bool empty = visible.last <= visible.first;
  const int64_t begin = (empty ? needed.first : visible.first) / kStep * kStep;
  const int64_t end = empty ? begin : round_up(visible.last, kStep);
  const float old_max = row_max;
  const float new_max = old_max > tile_max ? old_max : tile_max;
  // A row that has seen no key keeps -inf; 0 in its place makes exp(-inf - 0) = 0, not NaN.
  const V shift = splat(new_max == -kInfinity ? 0.0f : new_max);

  V sums{};
  const V zeros[kVectors] = {};
  for (int64_t at = needed.first / kStep * kStep; at < begin; at += kStep) {
    Probabilities<T>::store_and_sum(scores, at, zeros, sums);
  }
  int64_t at = begin;
  for (; at + kTogether * W <= end; at += kTogether * W) {
    exponentials<T, kTogether / kVectors>(scores, at, shift, sums);
  }
  for (; at < end; at += kStep) exponentials<T, 1>(scores, at, shift, sums);
  for (; at < needed.last; at += kStep) Probabilities<T>::store_and_sum(scores, at, zeros, sums);

  const float rescale = exp(splat(old_max) - shift)[0];
  row_max = new_max;
  row_sum = row_sum * rescale + sum_lanes(sums);
  return rescale;
}

}  // namespace pympa::PYMPA_ISA
