// Packed operands of the tile product: rows for A, panels of kPanel columns for B. All elements
// that a tile may read beyond the data are zero, so padding never changes a sum.
#pragma once

#include "cpu/transpose.hpp"

namespace pympa::PYMPA_ISA {

// Groups of a panel of `length` terms.
template <class Math>
PYMPA_INLINE int64_t groups_of(int64_t length) {
  return round_up((length + Math::kDepth - 1) / Math::kDepth, Math::kStep);
}

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

// A panel [groups, kPanel] whose columns are kPanel source rows (a weight's outputs, or keys).
// Source rows outside [first, last) become zero columns.
template <class Math, class T>
PYMPA_INLINE void pack_transposed(const T* source, int64_t row_stride, int64_t first, int64_t last,
                                  int64_t length, typename Math::Stored* panel) {
  for (int64_t column = 0; column < kPanel; column += W) {
    for (int64_t i = 0; i < length; i += Transposed<Math, T>::kGroups * Math::kDepth) {
      Transposed<Math, T> block;
      block.template load<false>(source + column * row_stride + i, row_stride, first - column,
                                 last - column, length - i);
      auto* target = panel + i / Math::kDepth * kPanel + column;
      const int64_t groups = groups_of<Math>(length - i);
#pragma GCC unroll 32
      for (int group = 0; group < block.kGroups; ++group) {
        if (group >= groups) break;
        Math::store_b(target + group * kPanel, block.lanes(group));
      }
    }
  }
}

// One vector of one group of rows of a row-major matrix (values): rows row, row + 1, ... as far as
// it is deep. Rows outside [first, last) read as zero.
template <class Math, class T>
PYMPA_INLINE typename Math::Lanes load_group(const T* source, int64_t row_stride, int64_t row,
                                             int64_t first, int64_t last, int64_t count) {
  const T* at = source + row * row_stride;
  if constexpr (Math::kDepth == 1) {
    return load(at, count);
  } else {
    VBits even{}, odd{};
    if (row >= first && row < last) even = bits_of(load(at, count)) >> 16;
    if (row + 1 >= first && row + 1 < last) odd = bits_of(load(at + row_stride, count));
    return even | odd;
  }
}

// Panels [panel][groups, kPanel] of a row-major matrix (values): row r goes to group r / depth.
// Rows [first, last) hold data; every group, and every step of them, that they touch is written in
// full.
template <class Math, class T>
PYMPA_INLINE void pack_values(const T* source, int64_t row_stride, int64_t first, int64_t last,
                              int64_t columns, int64_t panel_size, typename Math::Stored* panels) {
  constexpr int64_t kTerms = Math::kDepth * Math::kStep;
  for (int64_t group = first / kTerms * Math::kStep; group < groups_of<Math>(last); ++group) {
    for (int64_t column = 0; column < columns; column += W) {
      auto* target = panels + column / kPanel * panel_size + group * kPanel + column % kPanel;
      Math::store_b(target, load_group<Math>(source + column, row_stride, group * Math::kDepth,
                                             first, last, columns - column));
    }
  }
}

}  // namespace pympa::PYMPA_ISA
