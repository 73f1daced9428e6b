// Operands of the tile product, packed: rows for A, panels of kPanel columns for B. Everything a
// tile may read beyond the data is zero, so that padding never changes a sum.
#pragma once

#include "cpu/tile.hpp"

namespace pympa::PYMPA_ISA {

// One A row of `length` elements in compute format; writes whole vectors.
template <class Math, class T>
PYMPA_INLINE void pack_row(const T* source, int64_t length, typename Math::Group* target) {
  if constexpr (Math::kDepth == 1) {
    for (int64_t i = 0; i < length; i += W) store(target + i, load(source + i, length - i));
  } else {
    __builtin_memcpy(target, source, static_cast<size_t>(length) * sizeof(T));
    if (length % 2) reinterpret_cast<T*>(target)[length] = T{};
  }
}

// In-register transpose of W x W 32-bit lanes: log2 W rounds of perfect shuffles.
PYMPA_INLINE void transpose(VBits (&rows)[W]) {
  VInt low, high;
  for (int lane = 0; lane < W; ++lane) {
    low[lane] = lane / 2 + (lane % 2) * W;
    high[lane] = low[lane] + W / 2;
  }
  for (int round = 1; round < W; round *= 2) {
    VBits next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// One W x W block of groups: source rows become lanes. Rows outside [first, last) read as zero.
template <class Math, class T>
PYMPA_INLINE void pack_block(const T* source, int64_t row_stride, int64_t first, int64_t last,
                             int64_t length, typename Math::Stored* target) {
  VBits rows[W];
  for (int row = 0; row < W; ++row) {
    rows[row] = VBits{};
    if (row < first || row >= last) continue;
    const T* at = source + row * row_stride;
    if constexpr (Math::kDepth == 1) {
      rows[row] = bits_of(load(at, length));
    } else if (length >= 2 * W) {
      rows[row] = load_raw<VBits>(reinterpret_cast<const uint32_t*>(at));
    } else {
      __builtin_memcpy(&rows[row], at, static_cast<size_t>(length) * sizeof(T));
    }
  }
  transpose(rows);
  const int64_t groups = (length + Math::kDepth - 1) / Math::kDepth;
  for (int64_t group = 0; group < min_of(W, groups); ++group) {
    if constexpr (sizeof(typename Math::Stored) == 4) {
      store_raw(target + group * kPanel, rows[group]);
    } else {
      store(target + group * kPanel, from_bits(rows[group]));
    }
  }
}

// A panel [groups, kPanel] whose columns are kPanel source rows (a weight's outputs, or keys).
// Source rows outside [first, last) become zero columns.
template <class Math, class T>
PYMPA_INLINE void pack_transposed(const T* source, int64_t row_stride, int64_t first, int64_t last,
                                  int64_t length, typename Math::Stored* panel) {
  for (int64_t column = 0; column < kPanel; column += W) {
    for (int64_t i = 0; i < length; i += W * Math::kDepth) {
      pack_block<Math>(source + column * row_stride + i, row_stride, first - column, last - column,
                       length - i, panel + i / Math::kDepth * kPanel + column);
    }
  }
}

// Panels [panel][groups, kPanel] of a row-major matrix (values): row r goes to group r / depth.
// Rows [first, last) hold data; every group that they touch is written in full.
template <class Math, class T>
PYMPA_INLINE void pack_values(const T* source, int64_t row_stride, int64_t first, int64_t last,
                              int64_t columns, int64_t panel_size, typename Math::Stored* panels) {
  for (int64_t group = first / Math::kDepth; group * Math::kDepth < last; ++group) {
    const int64_t row = group * Math::kDepth;
    const T* at = source + row * row_stride;
    for (int64_t column = 0; column < columns; column += W) {
      const int64_t count = columns - column;
      auto* target = panels + column / kPanel * panel_size + group * kPanel + column % kPanel;
      if constexpr (Math::kDepth == 1) {
        store(target, load(at + column, count));
      } else {
        const T* next = at + row_stride;
        VBits even{}, odd{};
        if (row >= first) even = bits_of(load(at + column, count)) >> 16;
        if (row + 1 < last) odd = bits_of(load(next + column, count));
        store_raw(target, even | odd);
      }
    }
  }
}

}  // namespace pympa::PYMPA_ISA
