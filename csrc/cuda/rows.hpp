// Kernels that work row by row: rows are cut into groups of elements, one thread takes a group, and
// a group moves in accesses of 16 bytes where all rows start at multiples of 16, else element by
// element. Which of the two changes speed, never bits.
#pragma once

#include "cuda/convert.hpp"

namespace pympa::cuda {

constexpr int kAccessBytes = 16;  // what one thread reads or writes at a time, at most

// Elements of T in one access.
template <class T>
constexpr int kGroup = kAccessBytes / static_cast<int>(sizeof(T));

// Matrix rows `stride` elements apart.
template <class T>
struct Rows {
  T* at;
  std::int64_t stride;

  __device__ __forceinline__ T* operator()(std::int64_t row, std::int64_t column) const {
    return at + row * stride + column;
  }
};

// Whether every row starts at a multiple of 16 bytes; so do its groups.
template <class T>
bool is_aligned(const Rows<T>& rows) {
  return (reinterpret_cast<std::uintptr_t>(rows.at) |
          static_cast<std::uintptr_t>(rows.stride) * sizeof(T)) %
             kAccessBytes ==
         0;
}

// x = the first `left` of kCount elements at `from`, zeros behind them.
template <int kCount, class T>
__device__ __forceinline__ void load(const T* from, std::int64_t left, bool aligned,
                                     float (&x)[kCount]) {
  constexpr int kEach = kCount < kGroup<T> ? kCount : kGroup<T>;
  if (aligned && left >= kCount) {
#pragma unroll
    for (int first = 0; first < kCount; first += kEach) {
      const auto group = *reinterpret_cast<const Vector<T, kEach>*>(from + first);
#pragma unroll
      for (int i = 0; i < kEach; ++i) x[first + i] = to_float(group.at[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = i < left ? to_float(from[i]) : 0.0F;
  }
}

// Rounds the first `left` of kCount values to T.
template <int kCount, class T>
__device__ __forceinline__ void store(T* to, std::int64_t left, bool aligned,
                                      const float (&x)[kCount]) {
  constexpr int kEach = kCount < kGroup<T> ? kCount : kGroup<T>;
  if (aligned && left >= kCount) {
#pragma unroll
    for (int first = 0; first < kCount; first += kEach) {
      Vector<T, kEach> group;
#pragma unroll
      for (int i = 0; i < kEach; ++i) group.at[i] = from_float<T>(x[first + i]);
      *reinterpret_cast<Vector<T, kEach>*>(to + first) = group;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < left) to[i] = from_float<T>(x[i]);
    }
  }
}

// Blocks of 256 threads, along a row first, and as many rows as that leaves room for.
struct RowGrid {
  dim3 grid, block;
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

inline RowGrid row_grid(std::int64_t rows, std::int64_t groups) {
  constexpr unsigned kThreads = 256;
  constexpr std::int64_t kMostBlocksOfARow = 65535;  // of the grid's y
  unsigned along = 1;
  while (along < kThreads && along < groups) along *= 2;
  const unsigned down = kThreads / along;
  const std::int64_t across = ceil_div(groups, along);
  return {dim3{static_cast<unsigned>(ceil_div(rows, down)),
               static_cast<unsigned>(across < kMostBlocksOfARow ? across : kMostBlocksOfARow)},
          dim3{along, down}};
}

// Calls visit(row, group) for the groups of this thread of a row_grid(rows, groups).
template <class Visit>
__device__ __forceinline__ void for_each_group(std::int64_t rows, std::int64_t groups,
                                               Visit&& visit) {
  const std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const std::int64_t step = std::int64_t{gridDim.y} * blockDim.x;
  for (std::int64_t group = std::int64_t{blockIdx.y} * blockDim.x + threadIdx.x; group < groups;
       group += step) {
    visit(row, group);
  }
}

}  // namespace pympa::cuda
