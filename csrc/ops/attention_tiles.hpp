// Both products of attention in tiles.
//
// Probabilities lie in a row of scores as the lines of A, so the second product reads them as they
// are. Of few rows the first one has its roles exchanged, with keys as rows of A as memory has
// them; the bits are the same.
#pragma once

#include "cpu/amx_product.hpp"
#include "ops/attention_rows.hpp"

namespace pympa::PYMPA_ISA {

// Sizes of one thread's scratch, in bytes.
template <class T>
struct Layout<T, true> {
  static constexpr int64_t kKeyStep = kTileTerms;
  static constexpr int64_t kTileSteps = kKeyTile / kTileTerms;
  static constexpr int64_t kSums = 4 * kTileRows * kTileRows;  // of 2 x 2 tiles
  static constexpr int64_t kTileBytes = kTileRows * kTileLine;

  int64_t steps, key_panel, value_panel, queries, keys, values;

  Layout(int64_t head_dim, int64_t v_head_dim)
      : steps(steps_of(head_dim)),
        key_panel(steps * kStepBytes<T>),
        value_panel(kTileSteps * kStepBytes<T>),
        queries(kRows / kTileRows * steps * kPieces<T> * kTileBytes),
        keys(kKeyTile / kPanel * key_panel),
        values((v_head_dim + kPanel - 1) / kPanel * value_panel) {}

  static int64_t sums() { return 2 * kSums * static_cast<int64_t>(sizeof(float)); }

  // A panel of values for one row, or of keys before it is split.
  int64_t spare() const { return max_of(value_panel, steps * kStepBytes<T>); }

  int64_t bytes() const {
    const int64_t scores = kRows * kScoreStride * static_cast<int64_t>(sizeof(float));
    return round_up(scores + queries + keys + values + sums() + spare(), kAlignment);
  }
};

template <class T>
struct TileRows : Rows<T> {
  using Tiles = Layout<T, true>;
  using Rows<T>::args, Rows<T>::layout, Rows<T>::scores, Rows<T>::visible, Rows<T>::rows_of,
      Rows<T>::queries_of, Rows<T>::flat_rows;

  static constexpr bool kNeedsFinite = kPieces<T> > 1;  // a product of pieces makes NaN of infinity
  static constexpr int64_t kProbabilities = kPieces<T> * kTileLine;  // bytes of a step

  TileScope tiles;
  char* keys;
  char* values;
  char* queries;
  float* sums;  // of the product in hand, and of the one before
  char* spare;
  bool special[kRows];  // queries that cannot be split

  TileRows(const AttendArgs& call, int thread) : Rows<T>(call, thread) {
    keys = this->scratch();
    values = keys + layout.keys;
    queries = values + layout.values;
    sums = reinterpret_cast<float*>(queries + layout.queries);
    spare = reinterpret_cast<char*>(sums) + Tiles::sums();
  }

  static constexpr int64_t kScoreBytes = kScoreStride * static_cast<int64_t>(sizeof(float));

  // Probabilities of 16 or 32 rows from `row` on, as A.
  ARows probabilities(int64_t row, int64_t step) const {
    const char* at = reinterpret_cast<const char*>(scores) + row * kScoreBytes;
    return {at + step * kProbabilities, kScoreBytes, kTileRows * kScoreBytes, kProbabilities,
            kTileLine};
  }

  // Rows [first, last) of values, columns from `column` on, as a panel of B.
  ColumnMask pack_panel(const KeyTile& tile, int64_t kv_head, int64_t column, Span rows,
                        char* panel) const {
    const T* from = rows_of(tile.v, tile.row, kv_head) + column;
    const int64_t columns = min_of(kPanel, args.v_head_dim - column);
    if constexpr (kPieces<T> == 1) {
      pack_values<PairMath>(from, tile.v.row, rows.first, rows.last, columns, 0,
                            reinterpret_cast<uint32_t*>(panel));
      return {};
    } else {
      return split_panel<T>(from, tile.v.row, rows.first, rows.last, columns, panel);
    }
  }

  // The score of a query and a key by multiply-adds, for what cannot be split.
  float exact_score(int64_t row, const T* key) const {
    V sum{};
    for (int64_t i = 0; i < args.head_dim; ++i) {
      sum = fma(load(queries_of[row] + i, 1), load(key + i, 1), sum);
    }
    return sum[0];
  }

  // The scores of queries [first, last) and keys [at, at + keys) that cannot be split.
  void mend_scores(const KeyTile& tile, int64_t kv_head, int64_t first, int64_t last, int64_t at,
                   int64_t keys_here, const ColumnMask& unsplit) const {
    const bool any = unsplit.any();
    for (int64_t row = first; row < last; ++row) {
      if (!any && !special[row]) continue;
      for (int64_t i = 0; i < keys_here; ++i) {
        const int64_t key = at + i;
        if (key < tile.span.first || key >= tile.span.last) continue;
        if (!special[row] && !unsplit.lanes[i / W][i % W]) continue;
        scores[row * kScoreStride + key] =
            exact_score(row, rows_of(tile.k, tile.row + key, kv_head));
      }
    }
  }

  // The partial output of one row, from the values that it sees alone: consume(column, vector).
  template <class Consume>
  PYMPA_NOINLINE void multiply_visible(const KeyTile& tile, int64_t kv_head, int64_t row,
                                       Consume&& consume) {
    const Span seen = visible[row];
    tiles.configure(kTileRows);
    for (int64_t column = 0; column < args.v_head_dim; column += kPanel) {
      const int64_t columns = min_of(kPanel, args.v_head_dim - column);
      V found[2] = {};
      if (!is_empty(seen)) {
        const ColumnMask unsplit = pack_panel(tile, kv_head, column, seen, spare);
        const int64_t step = seen.first / kTileTerms, steps = steps_of(seen.last) - step;
        product_of_tiles<T, Streamed::kB, 1, 2>(probabilities(row / kTileRows * kTileRows, step),
                                                spare + step * kStepBytes<T>, steps, sums, kPanel,
                                                [] {});
        const float* own = sums + row % kTileRows * kPanel;
        for (int i = 0; i < 2; ++i) found[i] = load(own + i * W);
        if (kPieces<T> > 1 && unsplit.any())
          mend_values(tile, kv_head, row, column, unsplit, found);
      }
      for (int i = 0; i < 2 && i * W < columns; ++i) consume(column + i * W, found[i]);
    }
  }

  // Sums of the columns that cannot be split, by multiply-adds.
  void mend_values(const KeyTile& tile, int64_t kv_head, int64_t row, int64_t column,
                   const ColumnMask& unsplit, V (&found)[2]) const {
    char* lines = reinterpret_cast<char*>(scores + row * kScoreStride);
    const RowLines p{lines, kProbabilities, kTileLine};
    const T* values_here = rows_of(tile.v, tile.row, kv_head) + column;
    const Span seen = visible[row];
    V exact[2];
    multiply_row<T>(p, false, values_here, tile.v.row, seen.first, seen.last,
                    args.v_head_dim - column, exact);
    for (int i = 0; i < 2; ++i) found[i] = chosen(unsplit.lanes[i], exact[i], found[i]);
  }
};

}  // namespace pympa::PYMPA_ISA
