// Products of few rows with B straight from memory: each line of it is read once, in the order of
// memory, and packed nowhere. The sums are those of a tile, in instalments: a float32 C in cache
// carries them from one piece of B to the next, so the bits are the same.
#pragma once

#include "cpu/pack.hpp"

namespace pympa::PYMPA_ISA {

constexpr int64_t kLine = 64;  // bytes

// Asks for the line at `address`, which need not exist, into L2.
PYMPA_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 1); }

// Calls run.operator()<count>(row) for strips of 4, 2 and 1 rows that make up `rows`.
template <class Run>
PYMPA_INLINE void for_each_strip(int64_t rows, Run&& run) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) run.template operator()<4>(row);
  if (row + 2 <= rows) {
    run.template operator()<2>(row);
    row += 2;
  }
  if (row < rows) run.template operator()<1>(row);
}

// C [kRows, W] += A [kRows, groups] x block [groups <= kGroups, W] (keys as columns); the first
// instalment starts from zero.
template <class Math, int kRows, bool kWhole, class Block>
PYMPA_INLINE void add_keys(const Block& block, int64_t groups, bool first,
                           const typename Math::Group* a, int64_t a_stride, float* c,
                           int64_t c_stride) {
  V sums[kRows];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) sums[row] = first ? V{} : load(c + row * c_stride);
#pragma GCC unroll 32
  for (int group = 0; group < Block::kGroups; ++group) {
    if (!kWhole && group >= groups) break;
    const auto lanes = block.lanes(group);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      sums[row] = Math::dot(sums[row], Math::broadcast(a + row * a_stride + group), lanes);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) store(c + row * c_stride, sums[row]);
}

// Values [rows, columns] of T and what is read a while after them, row by row.
template <class T>
struct Values {
  const T *at, *next;
  int64_t stride, next_stride, columns;
};

// Vectors of C that a line of values feeds; two for pairs, which are made from two rows.
template <class Math, class T>
constexpr int kLineVectors = sizeof(T) == 2 && W == 16 ? 2 : 1;

// Whole vectors of one group of rows.
template <class Math, class T>
PYMPA_INLINE void load_groups(const T* at, int64_t stride,
                              typename Math::Lanes (&lanes)[kLineVectors<Math, T>]) {
  if constexpr (Math::kDepth == 1) {
#pragma GCC unroll 2
    for (int i = 0; i < kLineVectors<Math, T>; ++i) lanes[i] = load(at + i * W);
  } else {
    VShorts low, high;
    for (int lane = 0; lane < 2 * W; ++lane) {
      low[lane] = static_cast<uint16_t>(lane / 2 + lane % 2 * 2 * W);
      high[lane] = low[lane] + W;
    }
    const VShorts even = load_raw<VShorts>(reinterpret_cast<const uint16_t*>(at));
    const VShorts odd = load_raw<VShorts>(reinterpret_cast<const uint16_t*>(at + stride));
    lanes[0] = reinterpret_cast<VBits>(__builtin_shuffle(even, odd, low));
    lanes[1] = reinterpret_cast<VBits>(__builtin_shuffle(even, odd, high));
  }
}

// C [kRows, columns] += A [kRows, one group] x one group of values, of which only rows
// [first, last) exist; the first instalment starts from zero.
template <class Math, int kRows, class T>
PYMPA_INLINE void add_group(const typename Math::Group* a, int64_t a_stride,
                            const Values<T>& values, int64_t column, int64_t first, int64_t last,
                            bool from_zero, float* c, int64_t c_stride) {
  for (; column < values.columns; column += W) {
    const auto lanes = load_group<Math>(values.at + column, values.stride, 0, first, last,
                                        values.columns - column);
    for (int row = 0; row < kRows; ++row) {
      float* target = c + row * c_stride + column;
      const V sum = from_zero ? V{} : load(target);
      store(target, Math::dot(sum, Math::broadcast(a + row * a_stride), lanes));
    }
  }
}

// C [kRows, columns] += A [kRows, kGroups] x whole groups of values.
template <class Math, int kRows, int kGroups, class T>
PYMPA_NOINLINE void add_values(const typename Math::Group* a, int64_t a_stride,
                               const Values<T>& values, bool from_zero, float* c,
                               int64_t c_stride) {
  constexpr int kVectors = kLineVectors<Math, T>;
  typename Math::Lanes factors[kRows][kGroups];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) factors[row][g] = Math::broadcast(a + row * a_stride + g);
  }
  int64_t column = 0;
  for (; column + kVectors * W <= values.columns; column += kVectors * W) {
    V sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows * kVectors; ++i) {
      const float* old = c + i / kVectors * c_stride + column + i % kVectors * W;
      sums[i / kVectors][i % kVectors] = from_zero ? V{} : load(old);
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 2
      for (int row = g * Math::kDepth; row < (g + 1) * Math::kDepth; ++row) {
        prefetch(values.next + row * values.next_stride + column);
      }
      typename Math::Lanes lanes[kVectors];
      load_groups<Math>(values.at + g * Math::kDepth * values.stride + column, values.stride,
                        lanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows * kVectors; ++i) {
        V& sum = sums[i / kVectors][i % kVectors];
        sum = Math::dot(sum, factors[i / kVectors][g], lanes[i % kVectors]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows * kVectors; ++i) {
      store(c + i / kVectors * c_stride + column + i % kVectors * W,
            sums[i / kVectors][i % kVectors]);
    }
  }
  if (column == values.columns) return;
  Values<T> rest = values;
  for (int g = 0; g < kGroups; ++g) {
    add_group<Math, kRows>(a + g, a_stride, rest, column, 0, Math::kDepth, from_zero && g == 0, c,
                           c_stride);
    rest.at += Math::kDepth * values.stride;
  }
}

}  // namespace pympa::PYMPA_ISA
