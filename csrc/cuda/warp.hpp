// Sums and scans over the 32 lanes of a warp, in the same order on every call.
#pragma once

#include "cuda/runtime.hpp"

namespace pympa::cuda {

constexpr unsigned kRowsOfABlock = 4;  // where each is one warp's

__device__ __forceinline__ unsigned lane_index() { return threadIdx.x % kWarp; }

// A tree; every lane gets the sum, with the same bits.
__device__ __forceinline__ float warp_sum(float value) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(~0U, value, bits);
  return value;
}

// counts [length] become the sums of those before; by one warp.
__device__ __forceinline__ void exclusive_scan(std::int32_t* counts, int length) {
  const int lane = static_cast<int>(lane_index());
  std::int32_t before = 0;
  for (int first = 0; first < length; first += kWarp) {
    const int at = first + lane;
    const std::int32_t own = at < length ? counts[at] : 0;
    std::int32_t sum = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const std::int32_t other = __shfl_up_sync(~0U, sum, step);
      if (lane >= step) sum += other;
    }
    if (at < length) counts[at] = before + sum - own;
    before += __shfl_sync(~0U, sum, kWarp - 1);
  }
  __syncwarp();
}

}  // namespace pympa::cuda
