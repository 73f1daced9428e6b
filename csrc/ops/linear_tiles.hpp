// Products of linear layers in tiles: A [rows, 512] times panels, 32 rows x 32 columns at a time.
//
// A panel meets all rows before the next one. It stays in L1, and A comes from L2 in the order in
// which it lies there, [16 rows][step][piece] tiles. A partial goes to scratch, and is added to C
// while the tiles work on the next one.
#pragma once

#include "cpu/amx_product.hpp"
#include "ops/linear_block.hpp"

namespace pympa::PYMPA_ISA {

// A partial that is still to be added to C.
struct PendingSums : PendingRows<PendingSums> {
  const float* from = nullptr;
  float* to = nullptr;
  int64_t stride = 0, vectors = 0;
  bool from_zero = false;

  PYMPA_INLINE void add_row() {
    for (int64_t i = 0; i < vectors * W; i += W) {
      store(to + i, from_zero ? load(from + i) : load(to + i) + load(from + i));
    }
    from += kPanel;
    to += stride;
    --rows;
  }
};

// Partials of one k-block, of rows that `pack_row` has taken.
template <class T>
struct LinearProducts {
  static constexpr int64_t kSteps = kKBlock / kTileTerms;
  static constexpr int64_t kTileBytes = kTileRows * kTileLine;
  static constexpr int64_t kGroupBytes = kSteps * kPieces<T> * kTileBytes;  // 16 rows of A
  static constexpr int64_t kSplitBytes = kPieces<T> > 1 ? kSteps * kStepBytes<T> : 0;
  static constexpr int64_t kSums = kPanel * kPanel;  // of 2 x 2 tiles

  // A in pieces and C of a block share L2.
  static constexpr int64_t kRowBlock = kPieces<T> == 1 ? 512 : 256;

  static int64_t scratch_bytes(int64_t rows) {
    const int64_t sums = 2 * kSums * static_cast<int64_t>(sizeof(float));
    return round_up(rows, kTileRows) / kTileRows * kGroupBytes + kSplitBytes + sums +
           round_up(rows, kAlignment);
  }

  TileScope tiles;
  char* a;
  char* b;        // a panel in pieces, if there are several
  float* sums;    // of the product in hand, and of the one before
  bool* special;  // rows that cannot be split

  LinearProducts(void* scratch, int64_t rows)
      : a(static_cast<char*>(scratch)),
        b(a + round_up(rows, kTileRows) / kTileRows * kGroupBytes),
        sums(reinterpret_cast<float*>(b + kSplitBytes)),
        special(reinterpret_cast<bool*>(sums + 2 * kSums)) {}

  RowLines lines_of(int64_t row) const {
    return {a + row / kTileRows * kGroupBytes + row % kTileRows * kTileLine,
            kPieces<T> * kTileBytes, kTileBytes};
  }

  void pack_row(const T* x, int64_t length, int64_t row) {
    special[row] = split_row<T>(x, length, lines_of(row));
  }

  // The last tile's other rows, which no sum depends on.
  void clear_rows(int64_t row, int64_t steps) {
    for (; row % kTileRows; ++row) {
      const RowLines lines = lines_of(row);
      for (int64_t i = 0; i < steps * kPieces<T>; ++i) {
        store_raw(reinterpret_cast<uint32_t*>(lines.at + i * lines.piece), VBits{});
      }
    }
  }

  // Sums of the rows and columns that have a value that cannot be split.
  void mend(int64_t row, int64_t rows, const ColumnMask& columns, const T* panel, int64_t length,
            float* c) {
    const bool any = columns.any();
    for (int64_t r = 0; r < rows; ++r) {
      if (!any && !special[row + r]) continue;
      V exact[2];
      multiply_row<T>(lines_of(row + r), special[row + r], panel, kPanel, 0, length, kPanel, exact);
      for (int i = 0; i < 2; ++i) {
        float* at = c + r * kPanel + i * W;
        const VBits mask = special[row + r] ? ~VBits{} : columns.lanes[i];
        store(at, chosen(mask, exact[i], load(at)));
      }
    }
  }

  // Adds the partial of terms [k, k + length) to C.
  void add_partial(const LinearArgs& args, int which, const Block& block, int64_t k, int64_t length,
                   Sums c) {
    const int64_t steps = steps_of(length);
    clear_rows(block.rows, steps);
    const Panel<T>* panel = panels_of<T>(args, which, block, k);
    PendingSums pending;
    int turn = 0;
    for (int64_t column = 0; column < block.columns; column += kPanel) {
      ColumnMask unsplit;
      const char* factors = b;
      if constexpr (kPieces<T> == 1) {
        factors = reinterpret_cast<const char*>(panel);
      } else {
        unsplit = split_panel<T>(panel, kPanel, 0, length, kPanel, b);
      }
      const int64_t columns = min_of(kPanel, block.columns - column);
      for (int64_t row = 0; row < block.rows; row += 2 * kTileRows) {
        const int64_t rows = min_of(2 * kTileRows, block.rows - row);
        const RowLines lines = lines_of(row);
        float* target = sums + (turn ^= 1) * kSums;
        const ARows of_strip{lines.at, kTileLine, kGroupBytes, lines.step, lines.piece};
        const auto add = [&] { pending.add_some(); };
        // Few rows stay in L1 while panels come from memory.
        if (block.rows > 2 * kTileRows) {
          any_product_of_tiles<T, Streamed::kA>(rows, columns, of_strip, factors, steps, target,
                                                kPanel, add);
        } else {
          any_product_of_tiles<T, Streamed::kB>(rows, columns, of_strip, factors, steps, target,
                                                kPanel, add);
        }
        pending.add_all();
        if constexpr (kPieces<T> > 1) mend(row, rows, unsplit, panel, length, target);
        pending = {{rows}, target, c.at + row * c.stride + column, c.stride, columns > W ? 2 : 1,
                   k == 0};
      }
      panel += panel_size<T>(args.k);
    }
    pending.add_all();
  }
};

}  // namespace pympa::PYMPA_ISA
