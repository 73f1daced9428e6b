// Pairs (row, choice) on the GPU: numbered row by row, and counted by expert in shared memory. One
// warp processes them in ascending order, 32 at a time, so that a sort is stable and drops the last
// pairs.
#pragma once

#include "cuda/warp.hpp"

namespace pympa::cuda {

// int32 [rows, chosen] by the number of the pair.
template <class T>
struct Pairs {
  T* at;
  std::int64_t stride;
  unsigned chosen;

  __device__ __forceinline__ T& operator[](unsigned pair) const {
    return at[pair / chosen * stride + pair % chosen];
  }
};

// What a block counts in, by expert.
__device__ __forceinline__ std::int32_t* counters() {
  return reinterpret_cast<std::int32_t*>(dynamic_shared());
}

inline std::size_t counter_bytes(std::int64_t experts) {
  return static_cast<std::size_t>(experts) * sizeof(std::int32_t);
}

// Lanes whose id, at least -1 and below 2^bits - 1, is this lane's.
__device__ __forceinline__ unsigned lanes_with(int id, int bits) {
  unsigned same = ~0U;
  for (int bit = 0; bit < bits; ++bit) {
    const bool is_set = (id + 1) >> bit & 1;
    const unsigned votes = __ballot_sync(~0U, is_set);
    same &= is_set ? votes : ~votes;
  }
  return same;
}

// Calls visit(pair, id, place) for pairs [first, last): place is what the counter of the id says,
// which is then one more. Pairs without an expert have no place, -1. By one warp.
template <class T, class Visit>
__device__ __forceinline__ void take_places(const Pairs<T>& ids, unsigned first, unsigned last,
                                            int bits, Visit&& visit) {
  const unsigned lane = lane_index(), lanes_before = (1U << lane) - 1;
  const auto id_of = [&](unsigned pair) { return pair < last ? ids[pair] : -1; };
  std::int32_t ahead = id_of(first + lane);  // is on its way while others take their places
  for (unsigned base = first; base < last; base += kWarp) {
    const unsigned pair = base + lane;
    const std::int32_t id = ahead;
    ahead = id_of(pair + kWarp);
    const unsigned same = lanes_with(id, bits);
    const std::int32_t place = id < 0 ? -1 : counters()[id] + __popc(same & lanes_before);
    __syncwarp();
    if (id >= 0 && (same & lanes_before) == 0) counters()[id] += __popc(same);
    __syncwarp();
    if (pair < last) visit(pair, id, place);
  }
}

// Counts pairs [first, last) by all threads of the block.
template <class T>
__device__ __forceinline__ void count_pairs(const Pairs<T>& ids, unsigned first, unsigned last,
                                            int experts) {
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += static_cast<int>(blockDim.x)) {
    counters()[e] = 0;
  }
  __syncthreads();
  for (unsigned pair = first + threadIdx.x; pair < last; pair += blockDim.x) {
    const std::int32_t id = ids[pair];
    if (id >= 0) atomicAdd(&counters()[id], 1);
  }
  __syncthreads();
}

}  // namespace pympa::cuda
