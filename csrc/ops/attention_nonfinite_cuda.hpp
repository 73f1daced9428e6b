// Values that are not finite, in a tile of V that some row sees only in part. A product multiplies
// hidden values by zero, which would give NaN for them.
//
// The threads that load such values find them. Their products are added separately, for the rows
// that see them, and the tile has zeros instead of them.
#pragma once

#include "ops/attention_fold_cuda.hpp"

namespace pympa::cuda {

// A pair of elements, with zeros for those that are not finite.
template <class T>
__device__ __forceinline__ std::uint32_t finite_or_zero(std::uint32_t pair) {
  constexpr std::uint32_t kLow = __is_same(T, Half) ? 0x7c00U : 0x7f80U, kHigh = kLow << 16;
  const std::uint32_t low = (pair & kLow) == kLow ? 0U : pair & 0xffffU;
  return low | ((pair & kHigh) == kHigh ? 0U : pair & 0xffff0000U);
}

// Whether something is not finite of what this thread loaded of a tile, by either way of loading;
// it has waited for its copies.
template <class T, int kRows, int kThreads, int kPanels>
__device__ __forceinline__ bool loaded_nonfinite(const unsigned char* tile) {
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned char* from = tile + chunk_offset(thread / kChunk, thread % kChunk);
  std::uint32_t zeros[2] = {0, 0};
#pragma unroll 2
  for (int i = 0; i < kPanels * kRows; i += kThreads / kChunk) {
    const uint4 chunk = *reinterpret_cast<const uint4*>(from + i * kRowBytes);
    zeros[0] = add_zero_times<T>(add_zero_times<T>(zeros[0], chunk.x), chunk.y);
    zeros[1] = add_zero_times<T>(add_zero_times<T>(zeros[1], chunk.z), chunk.w);
  }
  return (zeros[0] | zeros[1]) != 0;
}

// Zeros for what is not finite of what this thread loaded.
template <class T, int kRows, int kThreads, int kPanels>
__device__ __forceinline__ void clear_nonfinite(unsigned char* tile) {
  const int thread = static_cast<int>(threadIdx.x);
  unsigned char* from = tile + chunk_offset(thread / kChunk, thread % kChunk);
#pragma unroll 1
  for (int i = 0; i < kPanels * kRows; i += kThreads / kChunk) {
    uint4& chunk = *reinterpret_cast<uint4*>(from + i * kRowBytes);
    chunk = make_uint4(finite_or_zero<T>(chunk.x), finite_or_zero<T>(chunk.y),
                       finite_or_zero<T>(chunk.z), finite_or_zero<T>(chunk.w));
  }
}

// The rounded probability of key `key` of the tile, from the lane that has it or from `p`.
template <class Shape>
__device__ __forceinline__ float weight(const Scores<Shape>& s, const unsigned char* p, int m,
                                        int half, int key, const Place<Shape>& place) {
  using T = typename Shape::T;
  if constexpr (Shape::kColumnGroups > 1) {
    const int offset = chunk_offset(place.row(m, half), key / kChunk) + key % kChunk * 2;
    return to_float(*reinterpret_cast<const T*>(p + offset));
  } else {
    std::uint32_t mine = 0;
#pragma unroll
    for (int n = 0; n < Shape::kWarpKeys / 8; ++n) {
      const std::uint32_t pair = pack<T>(s[m][n][2 * half], s[m][n][2 * half + 1]);
      mine = n == key / 8 ? pair : mine;
    }
    mine = __shfl_sync(0xffffffffU, mine, place.lane / 4 * 4 + key % 8 / 2);
    return half_of<T>(mine, key % 2);
  }
}

// out += P V over the values that are not finite, each for the rows that see it: `multiply_values`
// then finds zeros in their place. sees(row, key) tells them, by row of the block and key of the
// tile.
template <class Shape, class Sees>
__device__ __forceinline__ void multiply_nonfinite(WarpState<Shape>& state, const Scores<Shape>& s,
                                                   const unsigned char* p, const unsigned char* v,
                                                   const Place<Shape>& place, const Sees& sees) {
  using T = typename Shape::T;
  constexpr int kTiles = Shape::kTiles;
#pragma unroll 1
  for (int key = 0; key < kKeys; ++key) {
    float weights[kTiles][2];  // negative where the row does not see the key
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float one = weight<Shape>(s, p, m, half, key, place);
        weights[m][half] = sees(place.row(m, half), key) ? one : -1.0F;
      }
    }
#pragma unroll
    for (int n = 0; n < Shape::kWarpColumns / 8; ++n) {
      const int column = place.column0 + n * 8;
      const std::uint32_t pair = *reinterpret_cast<const std::uint32_t*>(
          v + column / kPanel * (kKeys * kRowBytes) + chunk_offset(key, column % kPanel / kChunk) +
          place.lane % 4 * 4);
      if (finite_or_zero<T>(pair) == pair) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float x = half_of<T>(pair, i);
        if (x - x == 0.0F) continue;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float one = weights[m][half];
            float& sum = state.out[m][n][2 * half + i];
            sum = one < 0.0F ? sum : fmaf(one, x, sum);
          }
        }
      }
    }
  }
}

}  // namespace pympa::cuda
