// Both products of attention in tiles.
//
// Probabilities lie in a row of scores as the lines of A, so the second product reads them as they
// are. Of few rows the first one has its roles exchanged, with keys as rows of A as memory has
// them; the bits are the same.
#pragma once

#include "cpu/amx_product.hpp"
#include "cpu/stream.hpp"
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
    V exact[2] = {};
    for (int64_t key = visible[row].first; key < visible[row].last; ++key) {
      const V factor = splat(term_of<T>(p, false, key));
      const T* at = rows_of(tile.v, tile.row + key, kv_head) + column;
      for (int i = 0; i < 2; ++i) {
        const int64_t count = args.v_head_dim - column - i * W;
        if (count > 0) exact[i] = fma(factor, load(at + i * W, count), exact[i]);
      }
    }
    for (int i = 0; i < 2; ++i) {
      const VBits chosen = unsplit.lanes[i];
      found[i] = from_bits((bits_of(exact[i]) & chosen) | (bits_of(found[i]) & ~chosen));
    }
  }
};

// A partial output in scratch that is still to be added to rescaled rows.
struct PendingOutput {
  const float* from = nullptr;
  float* const* out = nullptr;
  const float* rescale = nullptr;
  int64_t column = 0, columns = 0, rows = 0;

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

  // Two rows a step are 32 of them in a key tile.
  PYMPA_INLINE void add_some() {
    if (rows > 0) add_row();
    if (rows > 0) add_row();
  }

  PYMPA_INLINE void add_all() {
    while (rows > 0) add_row();
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
      pending = {target, out + row, rescale + row, column, columns, rows};
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
