// One row of one key tile: scaled scores become probabilities, and the row's running maximum and
// sum move on (the online softmax of Milakov & Gimelshein, 2018; tiled as in FlashAttention,
// Dao et al., 2022).
#pragma once

#include "cpu/math.hpp"
#include "cpu/tile.hpp"

namespace pympa::PYMPA_ISA {

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

// Rounds to T, stores in compute format at element `offset`, and returns the rounded lanes.
template <class T>
PYMPA_INLINE V store_probabilities(typename MathOf<T>::Attention::Group* row, int64_t offset, V p) {
#if PYMPA_ISA_LEVEL == 3
  if constexpr (MathOf<T>::Attention::kDepth == 2) {
    const auto rounded = reinterpret_cast<VShort>(_mm512_cvtneps_pbh(p));
    store_raw(reinterpret_cast<BFloat*>(row) + offset, rounded);
    return bfloat_to_float(rounded);
  }
#endif
  const V rounded = round_to<T>(p);
  store(reinterpret_cast<float*>(row) + offset, rounded);
  return rounded;
}

// Scales, caps and masks the scores of `visible` in place; returns their maximum. A NaN score is
// passed over here and comes back as a NaN probability.
template <bool kCapped>
PYMPA_INLINE float scale_scores(float* scores, Span visible, float scale, float softcap) {
  const V inverse_cap = splat(kCapped ? 1.0f / softcap : 0.0f);
  V largest = splat(-kInfinity);
  for (int64_t i = visible.first / W * W; i < visible.last; i += W) {
    V x = load(scores + i) * splat(scale);
    if constexpr (kCapped) x = splat(softcap) * tanh(x * inverse_cap);
    if (i < visible.first || i + W > visible.last) x = mask_outside(x, i, visible);
    store(scores + i, x);
    largest = max_or(x, largest);
  }
  return max_lanes(largest);
}

// Replaces the scores of one row by probabilities, in place, zero in `needed` outside `visible`.
// Returns the factor by which the row's earlier output is to be rescaled.
//
// Each lane sums the keys at its own absolute offset in ascending order, so row_sum depends neither
// on the other rows of the call nor on masked keys.
template <class T>
PYMPA_INLINE float fold_row(float* scores, Span visible, Span needed, float scale, float softcap,
                            float& row_max, float& row_sum) {
  auto* row = reinterpret_cast<typename MathOf<T>::Attention::Group*>(scores);
  const bool empty = visible.last <= visible.first;
  const int64_t begin = empty ? needed.first / W * W : visible.first / W * W;
  const int64_t end = empty ? begin : round_up(visible.last, W);

  float tile_max = -kInfinity;
  if (!empty) {
    tile_max = softcap > 0.0f ? scale_scores<true>(scores, visible, scale, softcap)
                              : scale_scores<false>(scores, visible, scale, softcap);
  }
  const float old_max = row_max;
  const float new_max = old_max > tile_max ? old_max : tile_max;
  // A row that has seen no key keeps -inf; 0 in its place makes exp(-inf - 0) = 0, not NaN.
  const V shift = splat(new_max == -kInfinity ? 0.0f : new_max);

  V sums{};
  for (int64_t i = needed.first / W * W; i < begin; i += W) store_probabilities<T>(row, i, V{});
  for (int64_t i = begin; i < end; i += W) {
    sums += store_probabilities<T>(row, i, exp(load(scores + i) - shift));
  }
  for (int64_t i = end; i < needed.last; i += W) store_probabilities<T>(row, i, V{});

  const float rescale = exp(splat(old_max) - shift)[0];
  row_max = new_max;
  row_sum = row_sum * rescale + sum_lanes(sums);
  return rescale;
}

}  // namespace pympa::PYMPA_ISA
