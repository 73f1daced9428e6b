// Attention of many rows in tiles.
#pragma once

#include "ops/attention_tiles.hpp"

namespace pympa::PYMPA_ISA {

// A partial output that is still to be added to rescaled rows.
struct PendingOutput : PendingRows<PendingOutput> {
  const float* from = nullptr;
  float* const* out = nullptr;
  const float* rescale = nullptr;
  int64_t column = 0, columns = 0;

  PYMPA_INLINE void add_row() {
    for (int64_t i = 0; i < columns; i += W) {
      float* target = *out + column + i;
      store(target, fma(load(target, columns - i), splat(*rescale), load(from + i)), columns - i);
    }
    from += kPanel;
    ++out;
    ++rescale;
    --rows;
  }
};

// Of many rows: K and V in panels, of which strips of 32 rows read all, one strip after the other.
template <class T>
struct PackedProducts<T, true> : TileRows<T> {
  using typename TileRows<T>::Tiles;
  using TileRows<T>::TileRows, TileRows<T>::args, TileRows<T>::layout, TileRows<T>::scores,
      TileRows<T>::queries, TileRows<T>::keys, TileRows<T>::values, TileRows<T>::flat_rows,
      TileRows<T>::out, TileRows<T>::rescale, TileRows<T>::rows_of, TileRows<T>::sums,
      TileRows<T>::spare, TileRows<T>::special, TileRows<T>::queries_of;

  static constexpr int64_t kStripRows = 2 * kTileRows;
  static constexpr int64_t kChunkBytes = 1 << 20;  // half of L2

  Span strips[kRows / kStripRows];        // what each strip of rows sees
  ColumnMask unsplit[kKeyTile / kPanel];  // keys

  PYMPA_NOINLINE void pack(const KeyTile& tile, int64_t kv_head) {
    if (args.makes_scores) pack_keys(tile, rows_of(tile.k, tile.row, kv_head));
    if (!args.folds_scores) return;
    for (int64_t column = 0; column < args.v_head_dim; column += kPanel) {
      this->pack_panel(tile, kv_head, column, tile.span,
                       values + column / kPanel * layout.value_panel);
    }
  }

  void pack_keys(const KeyTile& tile, const T* k) {
    for (int64_t at = tile.span.first / kPanel * kPanel; at < tile.span.last; at += kPanel) {
      const T* from = k + at * tile.k.row;
      char* panel = keys + at / kPanel * layout.key_panel;
      const int64_t first = tile.span.first - at, last = tile.span.last - at;
      if constexpr (kPieces<T> == 1) {
        pack_transposed<PairMath>(from, tile.k.row, first, last, args.head_dim,
                                  reinterpret_cast<uint32_t*>(panel));
      } else {
        T* whole = reinterpret_cast<T*>(spare);
        pack_transposed<FloatMath<T>>(from, tile.k.row, first, last, args.head_dim, whole);
        unsplit[at / kPanel] = split_panel<T>(whole, kPanel, 0, args.head_dim, kPanel, panel);
      }
    }
  }

  int64_t lines_of_group() const { return layout.steps * kPieces<T> * Tiles::kTileBytes; }

  void pack_queries() {
    constexpr int64_t kTileBytes = Tiles::kTileBytes;
    for (int64_t row = 0; row < round_up(flat_rows, kTileRows); ++row) {
      const RowLines lines{
          queries + row / kTileRows * lines_of_group() + row % kTileRows * kTileLine,
          kPieces<T> * kTileBytes, kTileBytes};
      if (row < flat_rows) {
        special[row] = split_row<T>(queries_of[row], args.head_dim, lines);
      } else {  // no score depends on the last tile's other rows
        for (int64_t i = 0; i < layout.steps * kPieces<T>; ++i) {
          store_raw(reinterpret_cast<uint32_t*>(lines.at + i * kTileBytes), VBits{});
        }
      }
    }
  }

  PYMPA_NOINLINE void score(const KeyTile& tile, int64_t kv_head, int64_t row) {
    const Span strip = strips[row / kStripRows];
    const int64_t rows = min_of(kStripRows, flat_rows - row);
    const ARows a{queries + row / kTileRows * lines_of_group(), kTileLine, lines_of_group(),
                  kPieces<T> * Tiles::kTileBytes, Tiles::kTileBytes};
    for (int64_t at = strip.first / kPanel * kPanel; at < strip.last; at += kPanel) {
      any_product_of_tiles<T, Streamed::kB>(rows, kPanel, a, keys + at / kPanel * layout.key_panel,
                                            layout.steps, scores + row * kScoreStride + at,
                                            kScoreStride, [] {});
      if constexpr (kPieces<T> > 1) {
        this->mend_scores(tile, kv_head, row, row + rows, at, kPanel, unsplit[at / kPanel]);
      }
    }
  }

  PYMPA_NOINLINE void multiply_values(int64_t row) {
    const Span strip = strips[row / kStripRows];
    const int64_t rows = min_of(kStripRows, flat_rows - row);
    const int64_t step = strip.first / kTileTerms, steps = steps_of(strip.last) - step;
    const ARows p = this->probabilities(row, step);
    PendingOutput pending;
    int turn = 0;
    for (int64_t column = 0; column < args.v_head_dim; column += kPanel) {
      const int64_t columns = min_of(kPanel, args.v_head_dim - column);
      const char* panel = values + column / kPanel * layout.value_panel + step * kStepBytes<T>;
      float* target = sums + (turn ^= 1) * Tiles::kSums;
      any_product_of_tiles<T, Streamed::kB>(rows, columns, p, panel, steps, target, kPanel,
                                            [&] { pending.add_some(); });
      pending.add_all();
      pending = {{rows}, target, out + row, rescale + row, column, columns};
    }
    pending.add_all();
  }

  // `multiply_values` row by row, each with what it sees.
  PYMPA_NOINLINE void multiply_values_by_row(const KeyTile& tile, int64_t kv_head, int64_t row) {
    const int64_t last = min_of(row + kStripRows, flat_rows);
    for (; row < last; ++row) {
      this->multiply_visible(tile, kv_head, row, [&](int64_t column, V found) {
        float* target = out[row] + column;
        const int64_t count = args.v_head_dim - column;
        store(target, fma(load(target, count), splat(rescale[row]), found), count);
      });
    }
  }

  // All that rows do with a tile of which they see something. Softmax of a strip comes between the
  // scores of the next strip and the values of the one before: tiles work on those meanwhile.
  void attend_strips(const KeyTile& tile, int64_t kv_head, Span, bool by_row) {
    for (int64_t row = 0; row < flat_rows + 2 * kStripRows; row += kStripRows) {
      if (row < flat_rows) {
        if (args.makes_scores) score(tile, kv_head, row);
        if (args.scores.data) {
          this->share_scores(tile, row, min_of(row + kStripRows, flat_rows));
        }
      }
      if (!args.folds_scores) continue;
      const int64_t folded = row - kStripRows, multiplied = folded - kStripRows;
      if (folded >= 0 && folded < flat_rows && !is_empty(strips[folded / kStripRows])) {
        this->fold_strip(folded, min_of(folded + kStripRows, flat_rows),
                         strips[folded / kStripRows]);
      }
      if (multiplied < 0 || is_empty(strips[multiplied / kStripRows])) continue;
      by_row ? multiply_values_by_row(tile, kv_head, multiplied) : multiply_values(multiplied);
    }
  }
};

}  // namespace pympa::PYMPA_ISA
