// The arguments of a CUDA attention launch, and the rules of visibility.
//
// Keys are processed in tiles of 64 positions, at multiples of 64 of the position in the sequence,
// and each row's maximum, sum and output are updated tile by tile in float32. So a row's bits
// depend on its own position and on the keys that it sees. They do not depend on other rows, or on
// where a call's keys are cut, if that is between tiles.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <functional>

#include "cuda/tile.hpp"
#include "ops/attention.hpp"

namespace pympa::cuda {

constexpr int kKeys = kPanel;    // positions of a tile
constexpr int kMostRanges = 64;  // of a launch; more take several
constexpr int kMostHeads = 128;  // likewise: parameters must stay below 4 KB
constexpr int kMostKeyDim = 576, kMostValueDim = 512;
constexpr int kMostTokens = 1 << 30;
constexpr int kMostRowStride = 1 << 24;  // elements, so that 32 bits reach through a tile
constexpr float kInfinity = HUGE_VALF;
constexpr float kLog2E = 1.4426950408889634F;

// Rows [row, row + length) are positions [start, start + length) of a sequence.
struct Range {
  int sequence, start, length, row;
};

// Passed by value: ranges and the map of heads live on the host, and nothing is uploaded.
struct AttendParams {
  HeadRows<const void> q, k, v;
  HeadRows<const float> scores;  // instead of q and k
  HeadRows<float> row_max, row_sum, out;
  int head_dim, v_head_dim;
  int window;  // 0: none
  float scale, softcap;
  bool causal;
  bool q_aligned, k_aligned, v_aligned;
  bool out_pairs_aligned;
  bool one_buffer;   // for K and V, where shared memory is short
  bool writes_sums;  // false if another launch folds the same scores into other columns
  int heads, q_range_count, k_range_count;
  std::uint16_t head[kMostHeads], kv_head[kMostHeads];  // ordered by kv_head
  Range q_ranges[kMostRanges], k_ranges[kMostRanges];
};
static_assert(sizeof(AttendParams) <= 4096);

__host__ __device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }

// Positions [first, last).
struct Span {
  int first, last;
};

__host__ __device__ inline Span visible(const AttendParams& params, int position) {
  Span span{0, INT_MAX};
  if (params.window > 0) span.first = max_of(position - params.window + 1, 0);
  if (params.causal) {
    span.last = position + 1;
  } else if (params.window > 0) {
    span.last = position + params.window;
  }
  return span;
}

// Positions of range `keys` that queries at positions `queries` see anything of.
__host__ __device__ inline Span seen_of(const AttendParams& params, const Range& keys,
                                        Span queries) {
  return {max_of(keys.start, visible(params, queries.first).first),
          min_of(keys.start + keys.length, visible(params, queries.last - 1).last)};
}

// Walks through the key tiles of which queries at positions `queries` see anything, range by range
// in the order of the call.
struct KeyTiles {
  const AttendParams& params;
  int sequence;
  Span queries;
  Span within{0, INT_MAX};  // positions of keys that count, cut at tiles
  int range = -1, range_count;
  int base = 0;  // position of the tile's first key, inside the range or not
  int end = 0;   // of what is seen of the range

  __device__ __forceinline__ KeyTiles(const AttendParams& p, int of_sequence, Span of_queries)
      : params(p), sequence(of_sequence), queries(of_queries), range_count(p.k_range_count) {}

  __device__ __forceinline__ bool next() {
    base += kKeys;
    while (base >= end) {
      if (++range >= range_count) return false;
      const Range& keys = params.k_ranges[range];
      if (keys.sequence != sequence) continue;
      const Span seen = seen_of(params, keys, queries);
      end = min(seen.last, within.last);
      base = max(seen.first, within.first) / kKeys * kKeys;
    }
    return true;
  }

  // Positions of the range's own keys in this tile.
  __device__ __forceinline__ Span keys() const {
    const Range& keys = params.k_ranges[range];
    return {max(keys.start, base), min(keys.start + keys.length, base + kKeys)};
  }

  // Row of the key at `base`, which may lie before the array.
  __device__ __forceinline__ std::int64_t row() const {
    const Range& keys = params.k_ranges[range];
    return std::int64_t{keys.row} + base - keys.start;
  }
};

}  // namespace pympa::cuda
