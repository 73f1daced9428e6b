// Products of linear layers in vector registers: A [rows, 512] in compute format times panels.
#pragma once

#include "cpu/stream.hpp"
#include "ops/linear_block.hpp"

namespace pympa::PYMPA_ISA {

constexpr int64_t kPadding = 16;  // keeps A rows off a power-of-two stride (L1 associativity)
constexpr int64_t kAStride = kKBlock + kPadding;
constexpr int64_t kMostStreamed = 16;  // rows; more gain little, and sums take scratch

// Whether reading the weight is most of the work. One row reads it best as it comes.
template <class Math>
bool is_streamed(int64_t rows) {
  return rows > 1 && rows <= (Math::kWidens ? kMostStreamed / 4 : kMostStreamed);
}

// C [rows, kPanel] (+)= A x panel for few rows; `next` is the panel that is read after this one.
template <class Math>
void add_panel(int64_t rows, const typename Math::Group* a, const typename Math::Stored* panel,
               const typename Math::Stored* next, int64_t groups, bool from_zero, Sums c) {
  float sums[kMostStreamed * kPanel];
  stream_panel<Math>(rows, a, kAStride, panel, next, groups, sums);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < kPanel; i += W) {
      float* at = c.at + row * c.stride + i;
      const V sum = load(sums + row * kPanel + i);
      store(at, from_zero ? sum : load(at) + sum);
    }
  }
}

// Partials of one k-block, of rows that `pack_row` has taken.
template <class T>
struct LinearProducts {
  using Math = typename MathOf<T>::Linear;
  using Group = typename Math::Group;

  static constexpr int64_t kRowBlock = 96;  // A and C of a block stay in L2 beside one panel

  static int64_t scratch_bytes(int64_t rows) {
    return rows * kAStride * static_cast<int64_t>(sizeof(Group));
  }

  Group* a;  // [rows, kAStride]

  LinearProducts(void* scratch, int64_t) : a(static_cast<Group*>(scratch)) {}

  void pack_row(const T* x, int64_t length, int64_t row) {
    PYMPA_ISA::pack_row<Math>(x, length, a + row * kAStride);
  }

  // Adds the partial of terms [k, k + length) to C.
  void add_partial(const LinearArgs& args, int which, const Block& block, int64_t k, int64_t length,
                   Sums c) {
    const auto* panels = panels_of<T>(args, which, block, 0);
    const int64_t groups = groups_of<Math>(length), size = panel_size<T>(args.k);
    for (int64_t column = 0; column < block.columns; column += kPanel) {
      const auto* panel = panels + column / kPanel * size + k / Math::kDepth * kPanel;
      if (groups > 0 && is_streamed<Math>(block.rows)) {
        const auto* next = panel + size;  // the next block's after the last
        if (column + kPanel >= block.columns && k + kKBlock < args.k) {
          next = panels + (k + kKBlock) / Math::kDepth * kPanel;
        } else if (column + kPanel >= block.columns) {
          next -= k / Math::kDepth * kPanel;
        }
        add_panel<Math>(block.rows, a, panel, next, groups, k == 0, {c.at + column, c.stride});
        continue;
      }
      const int vectors = static_cast<int>(min_of(kPanel, block.columns - column) + W - 1) / W;
      for (int64_t row = 0; row < block.rows; row += kStrip) {
        float* target = c.at + row * c.stride + column;
        const int rows = static_cast<int>(min_of(kStrip, block.rows - row));
        // The sums may have left the nearest cache; they are needed when the tile is done.
        for (int r = 0; r < rows; ++r) {
          for (int v = 0; v < vectors; ++v) __builtin_prefetch(target + r * c.stride + v * W, 1);
        }
        any_tile<Math>(rows, vectors, a + row * kAStride, kAStride, panel, groups,
                       [&](int r, int v, V sums) {
                         float* at = target + r * c.stride + v * W;
                         store(at, k == 0 ? sums : load(at) + sums);
                       });
      }
    }
  }
};

}  // namespace pympa::PYMPA_ISA
