// Products of few rows with B read directly from memory: each line once, in memory order, and
// prefetched. Sums have the same order as in a tile, but are computed in parts: a float32 C in the
// cache carries them from one piece of B to the next, so the bits are the same.
#pragma once

#include "cpu/pack.hpp"

namespace pympa::PYMPA_ISA {

constexpr int64_t kLine = 64;        // bytes
constexpr int64_t kPartGroups = 64;  // of a panel: 16 KiB at most, half of L1

// Asks for the line at `address`, which need not exist, into L2.
PYMPA_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 1); }

// Calls run.operator()<count>(row) for strips of kMost, ... 2 and 1 rows that make up `rows`.
template <int kMost, class Run>
PYMPA_INLINE void for_each_strip(int64_t rows, Run&& run, int64_t row = 0) {
  for (; row + kMost <= rows; row += kMost) run.template operator()<kMost>(row);
  if constexpr (kMost > 1) for_each_strip<kMost / 2>(rows, run, row);
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

// C [kRows, kPanel] += A [kRows, groups] x part of a panel; `next` is what is read a while after
// it.
template <class Math, int kRows>
PYMPA_INLINE void add_groups(const typename Math::Group* a, int64_t a_stride,
                             const typename Math::Stored* b, const typename Math::Stored* next,
                             int64_t groups, bool from_zero, float* c) {
  constexpr int64_t kPerLine = kLine / static_cast<int64_t>(sizeof(*b));
  V sums[kRows][kPanelVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kPanelVectors; ++i) {
    sums[i / kPanelVectors][i % kPanelVectors] = from_zero ? V{} : load(c + i * W);
  }
  for (int64_t group = 0; group < groups; ++group) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kPanel; i += kPerLine) prefetch(next + group * kPanel + i);
    typename Math::Lanes lanes[kPanelVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) lanes[v] = Math::load_b(b + group * kPanel + v * W);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const auto factor = Math::broadcast(a + row * a_stride + group);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) {
        sums[row][v] = Math::dot(sums[row][v], factor, lanes[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kPanelVectors; ++i) {
    store(c + i * W, sums[i / kPanelVectors][i % kPanelVectors]);
  }
}

// C [rows, kPanel] = A [rows, groups] x panel, of which memory gives each line once: all strips of
// rows meet a part of it before the next part. The first strip waits for memory; what it has asked
// for arrives while the others work from L1. So there should be two strips at least, unless the
// panel has to be widened for each.
template <class Math>
PYMPA_INLINE void stream_panel(int64_t rows, const typename Math::Group* a, int64_t a_stride,
                               const typename Math::Stored* panel,
                               const typename Math::Stored* next, int64_t groups, float* c) {
  for (int64_t at = 0; at < groups; at += kPartGroups) {
    const int64_t ahead = at + 2 * kPartGroups;
    const auto* then = ahead < groups ? panel + ahead * kPanel : next + (ahead - groups) * kPanel;
    const auto run = [&]<int kCount>(int64_t row) {
      add_groups<Math, kCount>(a + row * a_stride + at, a_stride, panel + at * kPanel, then,
                               min_of(kPartGroups, groups - at), at == 0, c + row * kPanel);
    };
    if (rows > 4 || Math::kWidens) {
      for_each_strip<4>(rows, run);
    } else if (rows > 2) {
      for_each_strip<2>(rows, run);
    } else {
      for_each_strip<1>(rows, run);
    }
  }
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
