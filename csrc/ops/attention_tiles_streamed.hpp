// Attention of few rows in tiles.
#pragma once

#include "cpu/stream.hpp"
#include "ops/attention_tiles.hpp"

namespace pympa::PYMPA_ISA {

// Of few rows: K is read as it lies, V in pairs of keys by way of a panel in L1.
template <class T>
struct StreamedProducts<T, true> : TileRows<T> {
  using typename TileRows<T>::Tiles;
  using TileRows<T>::args, TileRows<T>::layout, TileRows<T>::scores, TileRows<T>::queries,
      TileRows<T>::values, TileRows<T>::rows_of, TileRows<T>::sums, TileRows<T>::spare,
      TileRows<T>::special, TileRows<T>::queries_of, TileRows<T>::tiles;

  static constexpr int64_t kFewRows = kTileRows;

  const int64_t partial_stride;
  SharedHeads heads;

  StreamedProducts(const AttendArgs& call, int thread)
      : TileRows<T>(call, thread), partial_stride(round_up(call.v_head_dim, kPanel) + kPadding) {}

  // Partial outputs [kRows, partial_stride], in the place of packed values.
  float* partials() const { return reinterpret_cast<float*>(values); }

  // Queries are columns of tiles of B, [step][piece]; those of a head lie in the same tiles.
  char* queries_at(int64_t column) const {
    return queries + column / kTileRows * layout.steps * kPieces<T> * Tiles::kTileBytes;
  }

  // The first of `rows` columns for a head, `taken` being taken.
  static int64_t column_for(int64_t taken, int64_t rows) {
    return taken % kTileRows + rows > kTileRows ? round_up(taken, kTileRows) : taken;
  }

  void pack_queries() {
    constexpr int64_t kPairs = kTileLine / 4;
    __builtin_memset(queries, 0, static_cast<size_t>(layout.queries));
    for (const SharedHead& head : heads) {
      for (int64_t row = head.row; row < head.row + head.rows; ++row) {
        const int64_t column = head.column + row - head.row;
        char* target = queries_at(column) + column % kTileRows * 4;
        special[row] = false;
        for (int64_t i = 0; i < args.head_dim; i += kTileTerms) {
          alignas(64) char lines[kPieces<T> * kTileLine];
          special[row] |= split_row<T>(queries_of[row] + i, min_of(kTileTerms, args.head_dim - i),
                                       {lines, 0, kTileLine});
          for (int64_t pair = 0; pair < kPieces<T> * kPairs; ++pair) {
            __builtin_memcpy(target + pair * kTileLine, lines + pair * 4, 4);
          }
          target += kPieces<T> * Tiles::kTileBytes;
        }
      }
    }
  }

  // Keys [at, at + 16), terms from i on, in a tile: as they lie, or by way of scratch.
  template <int kPiece>
  PYMPA_INLINE void load_keys(const T* from, int64_t stride, bool whole, const char* lines) const {
    if (kPieces<T> == 1 && whole) {
      load_tile<kTileA>(from, stride * static_cast<int64_t>(sizeof(T)));
    } else {
      load_tile<kTileA>(lines + kPiece * kTileLine, kPieces<T> * kTileLine);
    }
  }

  // Products in the same order as with roles exchanged: the queries' piece is the first.
  template <int kIndex>
  PYMPA_INLINE void add_products(const T* from, int64_t stride, bool whole, const char* lines,
                                 const char* query) const {
    constexpr PieceProduct kNow = Split<T>::kOrder[kIndex];
    load_keys<kNow.b>(from, stride, whole, lines);
    load_tile<kTileB>(query + kNow.a * Tiles::kTileBytes, kTileLine);
    multiply_tiles<0, kTileA, kTileB>();
    if constexpr (kIndex + 1 < Split<T>::kProducts) {
      add_products<kIndex + 1>(from, stride, whole, lines, query);
    }
  }

  // Scores of keys [at, at + 16) and a head's rows.
  void score_block(const SharedHead& head, const KeyTile& tile, Span seen, int64_t at,
                   const SharedHeads::Place& next) {
    alignas(64) char lines[kTileRows * kPieces<T> * kTileLine];
    const T* keys = rows_of(tile.k, tile.row + at, head.kv_head);
    const bool all_keys = at >= seen.first && at + kTileRows <= seen.last;
    ColumnMask unsplit;
    zero_tile<0>();
    for (int64_t i = 0; i < args.head_dim; i += kTileTerms) {
      const int64_t terms = min_of(kTileTerms, args.head_dim - i);
      const bool whole = all_keys && terms == kTileTerms;
      if (whole) {
        const T* then = rows_of(next.array, next.row, head.kv_head) + i;
        for (int row = 0; row < kTileRows; ++row) prefetch(then + row * next.array.row);
      }
      if (kPieces<T> > 1 || !whole) {
        for (int64_t row = 0; row < kTileRows; ++row) {
          const bool here = at + row >= seen.first && at + row < seen.last;
          char* line = lines + row * kPieces<T> * kTileLine;
          if (!here) __builtin_memset(line, 0, static_cast<size_t>(kPieces<T> * kTileLine));
          if (here && split_row<T>(keys + row * tile.k.row + i, terms, {line, 0, kTileLine})) {
            unsplit.lanes[0][row] = ~0u;
          }
        }
      }
      add_products<0>(keys + i, tile.k.row, whole, lines,
                      queries_at(head.column) + i / kTileTerms * kPieces<T> * Tiles::kTileBytes);
    }
    store_tile<0>(sums, kTileLine);
    VBits columns[kTileRows];
    for (int i = 0; i < kTileRows; ++i) columns[i] = bits_of(load(sums + i * kTileRows));
    transpose(columns);
    float* target = scores + head.row * kScoreStride + at;
    for (int64_t row = 0; row < head.rows; ++row) {
      store(target + row * kScoreStride, from_bits(columns[head.column % kTileRows + row]));
    }
    if constexpr (kPieces<T> > 1) {
      this->mend_scores(tile, head.kv_head, head.row, head.row + head.rows, at, kTileRows, unsplit);
    }
  }

  PYMPA_NOINLINE void score(const KeyTile& tile, Span seen) {
    tiles.configure(kTileRows);
    for (int64_t at = seen.first / kTileRows * kTileRows; at < seen.last; at += kTileRows) {
      const SharedHeads::Place next =
          heads.next_of(tile.k, tile.row + at, seen.last - at, tile.v, tile.row + seen.first);
      for (const SharedHead& head : heads) score_block(head, tile, seen, at, next);
    }
  }

  // Values of one step of keys, columns from `column` on, added to the partial outputs of a head.
  template <int kColumnTiles>
  PYMPA_INLINE void add_values(const SharedHead& head, int64_t step, int64_t column, bool first) {
    float* partial = partials() + head.row * partial_stride + column;
    const int64_t bytes = partial_stride * static_cast<int64_t>(sizeof(float));
    if (first) {
      zero_tile<0>();
      if constexpr (kColumnTiles == 2) zero_tile<1>();
    } else {
      load_tile<0>(partial, bytes);
      if constexpr (kColumnTiles == 2) load_tile<1>(partial + kTileRows, bytes);
    }
    const ARows p = this->probabilities(head.row, step);
    PYMPA_ISA::add_products<T, Streamed::kB, 1, kColumnTiles, 0>(p, p.at, spare);
    store_tile<0>(partial, bytes);
    if constexpr (kColumnTiles == 2) store_tile<1>(partial + kTileRows, bytes);
  }

  // The partial outputs of a tile; the next one's keys are `next_keys`.
  PYMPA_NOINLINE void multiply_values(const KeyTile& tile, Span seen, int64_t next_keys) {
    int64_t configured = 0;
    const int64_t begin = seen.first / kTileTerms;
    for (int64_t step = begin; step * kTileTerms < seen.last; ++step) {
      const int64_t at = step * kTileTerms;
      const Span here{max_of(seen.first - at, 0), min_of(seen.last - at, kTileTerms)};
      const SharedHeads::Place next =
          heads.next_of(tile.v, tile.row + at, seen.last - at, tile.k, next_keys);
      KeyTile part = tile;
      part.row += at;
      for (const SharedHead& head : heads) {
        // A partial's other rows are another head's.
        if (head.rows != configured) tiles.configure(configured = head.rows);
        for (int64_t column = 0; column < args.v_head_dim; column += kPanel) {
          const T* then = rows_of(next.array, next.row, head.kv_head) + column;
          for (int64_t row = 0; row < here.last; ++row) prefetch(then + row * next.array.row);
          this->pack_panel(part, head.kv_head, column, here, spare);
          args.v_head_dim - column > kTileRows ? add_values<2>(head, step, column, step == begin)
                                               : add_values<1>(head, step, column, step == begin);
        }
      }
    }
  }

  // `multiply_values` row by row, each with what it sees.
  PYMPA_NOINLINE void multiply_values_by_row(const KeyTile& tile, Span) {
    for (const SharedHead& head : heads) {
      for (int64_t row = head.row; row < head.row + head.rows; ++row) {
        float* partial = partials() + row * partial_stride;
        this->multiply_visible(tile, head.kv_head, row,
                               [&](int64_t column, V found) { store(partial + column, found); });
      }
    }
  }
};

}  // namespace pympa::PYMPA_ISA
