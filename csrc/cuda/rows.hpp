// Kernels that work row by row. Rows are cut into groups of elements, with one thread for each
// group. A thread reads and writes a group in accesses of 16 bytes if all rows start at multiples
// of 16, otherwise element by element. The choice changes speed, never bits; it is made once for
// all accesses of a thread to a group, so that its loads are in flight together.
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

template <class T>
using Group = Vector<T, kGroup<T>>;

// The first `left` elements at `from`, zeros behind them; in one access if kWhole.
template <bool kWhole, class T>
__device__ __forceinline__ Group<T> read(const T* from, std::int64_t left) {
  if constexpr (kWhole) {
    return *reinterpret_cast<const Group<T>*>(from);
  } else {
    Group<T> group;
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) group.at[i] = i < left ? from[i] : from_float<T>(0.0F);
    return group;
  }
}

// x = the first `left` of kCount elements at `from`, zeros behind them.
template <bool kWhole, int kCount, class T>
__device__ __forceinline__ void load(const T* from, std::int64_t left, float (&x)[kCount]) {
  static_assert(kCount % kGroup<T> == 0);
#pragma unroll
  for (int first = 0; first < kCount; first += kGroup<T>) {
    const Group<T> group = read<kWhole>(from + first, left - first);
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) x[first + i] = to_float(group.at[i]);
  }
}

// Rounds the first `left` of kCount values to T.
template <bool kWhole, int kCount, class T>
__device__ __forceinline__ void store(T* to, std::int64_t left, const float (&x)[kCount]) {
  static_assert(kCount % kGroup<T> == 0);
#pragma unroll
  for (int first = 0; first < kCount; first += kGroup<T>) {
    Group<T> group;
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) group.at[i] = from_float<T>(x[first + i]);
    if constexpr (kWhole) {
      *reinterpret_cast<Group<T>*>(to + first) = group;
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; ++i) {
        if (first + i < left) to[first + i] = group.at[i];
      }
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

// Calls visit(row, i) for this thread's share of a row_grid(rows, count).
template <class Visit>
__device__ __forceinline__ void for_each_item(std::int64_t rows, std::int64_t count,
                                              Visit&& visit) {
  const std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const std::int64_t step = std::int64_t{gridDim.y} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < count; i += step) {
    visit(row, i);
  }
}

// Calls visit.operator()<kWhole>(row, column, left) for groups of kCount columns: `left` columns
// are left of the row, and kWhole tells that these are enough and that rows are aligned.
template <int kCount, class Visit>
__device__ __forceinline__ void for_each_group(std::int64_t rows, std::int64_t columns,
                                               bool aligned, Visit&& visit) {
  for_each_item(rows, (columns + kCount - 1) / kCount, [&](std::int64_t row, std::int64_t i) {
    const std::int64_t column = i * kCount, left = columns - column;
    if (aligned && left >= kCount) {
      visit.template operator()<true>(row, column, left);
    } else {
      visit.template operator()<false>(row, column, left);
    }
  });
}

}  // namespace pympa::cuda
