// Code that both CPU kernels of attention share: key tiles, visibility, and the softmax of a block
// of rows.
//
// Key tiles start at multiples of kKeyTile of the global position in the sequence, and the index in
// a tile is an absolute offset. So a row's bits depend on its own position and on the keys that it
// sees, not on other rows, later keys, chunking or threads. A product that skips masked keys omits
// only exact zeros. A product that reads masked keys multiplies their values by zero, which gives
// NaN if a value is not finite: if a tile hides such a value, each row uses only the values that it
// sees.
//
// A score tile writes S and a fold tile reads it: the caller's array holds S in between.
#pragma once

#include "cpu/pack.hpp"
#include "cpu/softmax.hpp"
#include "ops/attention.hpp"

namespace pympa::PYMPA_ISA {

constexpr int64_t kRows = 96;     // rows x heads of a block: S stays in L2 beside K and V
constexpr int64_t kPadding = 16;  // keeps rows off a power-of-two stride (L1 associativity)
constexpr int64_t kScoreStride = kKeyTile + kPadding;
constexpr int64_t kAlignment = 64;

// Keys [first, last) of one tile; `base` is the global position of offset 0. Its rows of `k` and
// `v` are consecutive from `row` on, that of offset 0, which may lie before the array where a range
// starts inside a tile; unless it has several `pieces`: then `Rows::gather` makes them so.
struct KeyTile {
  int64_t base, row;
  Span span;
  HeadRows<const void> k, v;
  const KeyRange* pieces;
  int64_t piece_count;
};

// Offsets of `tile` that a query at `position` sees.
PYMPA_INLINE Span visible_span(const AttentionRule& rule, int64_t position, int64_t base,
                               Span span) {
  const int64_t offset = position - base;
  if (rule.window > 0) span.first = max_of(span.first, offset - rule.window + 1);
  if (rule.causal) {
    span.last = min_of(span.last, offset + 1);
  } else if (rule.window > 0) {
    span.last = min_of(span.last, offset + rule.window);
  }
  return span;
}

// Those of the queries `rows` of `range` that see something of a tile.
PYMPA_INLINE Span rows_that_see(const AttentionRule& rule, const TokenRange& range, Span rows,
                                const KeyTile& tile) {
  const int64_t first_key = tile.base + tile.span.first - range.start;
  const int64_t last_key = tile.base + tile.span.last - 1 - range.start;
  if (rule.causal) {
    rows.first = max_of(rows.first, first_key);
  } else if (rule.window > 0) {
    rows.first = max_of(rows.first, first_key - rule.window + 1);
  }
  if (rule.window > 0) rows.last = min_of(rows.last, last_key + rule.window);
  return rows;
}

PYMPA_INLINE bool is_empty(Span span) { return span.last <= span.first; }

PYMPA_INLINE Span hull(Span a, Span b) {
  if (is_empty(a)) return b;
  if (is_empty(b)) return a;
  return {min_of(a.first, b.first), max_of(a.last, b.last)};
}

PYMPA_INLINE Span common(Span a, Span b) {
  return {max_of(a.first, b.first), min_of(a.last, b.last)};
}

// Calls run(ranges, count) for each run of key ranges that adjoin.
template <class Run>
PYMPA_INLINE void for_each_run(const AttendArgs& args, Run&& run) {
  for (int64_t i = 0; i < args.k_range_count;) {
    const int64_t first = i++;
    while (i < args.k_range_count && args.k_ranges[i].adjoins(args.k_ranges[i - 1])) ++i;
    run(args.k_ranges + first, i - first);
  }
}

// Moves `piece` on to the range with the key at `position`, and returns how many ranges from there
// on have keys before `end` in rows that do not continue those before.
PYMPA_INLINE int64_t pieces_at(const KeyRange*& piece, const KeyRange* last, int64_t position,
                               int64_t end) {
  while (piece->end() <= position) ++piece;
  int64_t count = 1;
  for (const KeyRange* next = piece + 1; next <= last && next->start < end; ++next) {
    if (count > 1 || !next->continues(next[-1])) ++count;
  }
  return count;
}

// Calls run(tile) for each key tile that queries [first, last) of `range` see anything of.
template <class Run>
PYMPA_INLINE void for_each_tile(const AttendArgs& args, const TokenRange& range, int64_t first,
                                int64_t last, Run&& run) {
  for_each_run(args, [&](const KeyRange* keys, int64_t count) {
    if (keys->sequence != range.sequence) return;
    const KeyRange* piece = keys;
    const int64_t start = keys->start, end = keys[count - 1].end();
    for (int64_t base = start / kKeyTile * kKeyTile; base < end; base += kKeyTile) {
      Span span{max_of(start - base, 0), min_of(end - base, kKeyTile)};
      span.first = visible_span(args.rule, range.start + first, base, span).first;
      span.last = visible_span(args.rule, range.start + last - 1, base, span).last;
      if (is_empty(span)) continue;
      const int64_t pieces =
          pieces_at(piece, keys + count - 1, base + span.first, base + span.last);
      run(KeyTile{base, piece->first_row + base - piece->start, span, args.k, args.v, piece,
                  pieces});
    }
  });
}

// Whether some tile of a call has rows that are not consecutive.
inline bool gathers_tiles(const AttendArgs& args) {
  for (int64_t i = 1; i < args.k_range_count; ++i) {
    const KeyRange &before = args.k_ranges[i - 1], &keys = args.k_ranges[i];
    if (keys.adjoins(before) && !keys.continues(before) && keys.start % kKeyTile) return true;
  }
  return false;
}

// Bytes of a tile's rows of all K/V heads.
inline int64_t gathered_bytes(const AttendArgs& args, int64_t element_bytes) {
  if (!gathers_tiles(args)) return 0;
  const int64_t row = args.kv_heads * (args.head_dim + args.v_head_dim) * element_bytes;
  return round_up(kKeyTile * row, kAlignment);
}

// Whether tiles multiply what is stored as T.
template <class T>
constexpr bool kTiled = PYMPA_ISA_LEVEL == 4 && !__is_same(T, float);

// How products of T read what they multiply, and where a thread's scratch has it.
template <class T, bool kByTiles = kTiled<T>>
struct Layout;
template <class T, bool kByTiles = kTiled<T>>
struct PackedProducts;
template <class T, bool kByTiles = kTiled<T>>
struct StreamedProducts;

// One thread's scratch, and the rows in hand by flat number. Each step is a function of its own in
// the binary too, so that its loops get all registers and a profile tells the steps apart.
template <class T>
struct Rows {
  const AttendArgs& args;
  const Layout<T> layout;
  float* scores;  // [kRows, kScoreStride]

  int64_t flat_rows = 0;
  const T* queries_of[kRows];
  float* shared[kRows];  // the caller's scores, at row 0 of the keys
  float* out[kRows];
  float* row_max[kRows];
  float* row_sum[kRows];
  float rescale[kRows];
  Span visible[kRows];

  T* gathered;  // rows of a tile that are not consecutive in the caller's arrays

  Rows(const AttendArgs& call, int thread) : args(call), layout(call.head_dim, call.v_head_dim) {
    const int64_t base = round_up(reinterpret_cast<int64_t>(call.workspace), kAlignment);
    scores = reinterpret_cast<float*>(base + thread * layout.bytes());
    gathered = reinterpret_cast<T*>(base + call.on.threads * layout.bytes() +
                                    thread * gathered_bytes(call, sizeof(T)));
  }

  // What is behind the scores.
  char* scratch() const { return reinterpret_cast<char*>(scores + kRows * kScoreStride); }

  static const T* rows_of(const HeadRows<const void>& array, int64_t row, int64_t head) {
    return static_cast<const T*>(array.data) + row * array.row + head * array.head;
  }

  static float* rows_of(const HeadRows<float>& array, int64_t row, int64_t head) {
    return array.data + row * array.row + head * array.head;
  }

  void add_row(int64_t row, int64_t head) {
    const int64_t flat = flat_rows++;
    if (args.scores.data) shared[flat] = rows_of(args.scores, row, head);
    if (args.folds_scores) {
      row_max[flat] = rows_of(args.row_max, row, head);
      row_sum[flat] = rows_of(args.row_sum, row, head);
      out[flat] = rows_of(args.out, row, head);
    }
    if (args.makes_scores) queries_of[flat] = rows_of(args.q, row, head);
  }

  // Copies the rows of `from` that `tile` has, of K/V heads [first, last), to `to`, row by row from
  // offset 0 on.
  HeadRows<const void> copied(const KeyTile& tile, const HeadRows<const void>& from, int64_t dim,
                              int64_t first, int64_t last, T* to) const {
    const HeadRows<const void> rows{to, args.kv_heads * dim, dim};
    const int64_t begin = tile.base + tile.span.first, end = tile.base + tile.span.last;
    for (const KeyRange* piece = tile.pieces; piece->start < end; ++piece) {
      const int64_t stop = min_of(piece->end(), end);
      for (int64_t at = max_of(piece->start, begin); at < stop; ++at) {
        for (int64_t head = first; head < last; ++head) {
          __builtin_memcpy(to + (at - tile.base) * rows.row + head * dim,
                           rows_of(from, piece->first_row + at - piece->start, head),
                           static_cast<size_t>(dim) * sizeof(T));
        }
      }
      if (piece->end() >= end) break;
    }
    return rows;
  }

  // The tile with consecutive rows of K/V heads [first, last): itself, or a copy.
  KeyTile gather(KeyTile tile, int64_t first, int64_t last) const {
    if (tile.piece_count == 1) return tile;
    T* values = gathered + kKeyTile * args.kv_heads * args.head_dim;
    tile.k = copied(tile, args.k, args.head_dim, first, last, gathered);
    tile.v = copied(tile, args.v, args.v_head_dim, first, last, values);
    tile.row = 0;
    tile.piece_count = 1;
    return tile;
  }

  // Visible scores of rows [begin, end), from the scratch to the caller's array or back.
  PYMPA_NOINLINE void share_scores(const KeyTile& tile, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = visible[row].first, count = visible[row].last - first;
      if (count <= 0) continue;
      float *ours = scores + row * kScoreStride + first, *theirs = shared[row] + tile.row + first;
      const size_t bytes = static_cast<size_t>(count) * sizeof(float);
      __builtin_memcpy(args.makes_scores ? theirs : ours, args.makes_scores ? ours : theirs, bytes);
    }
  }

  // Makes the scores of rows [first, last) ready for `fold`; writes their maxima.
  void prepare(int64_t first, int64_t last, float* tile_max) {
    for (int64_t row = first; row < last; ++row) {
      tile_max[row - first] = prepare_row<T>(scores + row * kScoreStride, visible[row],
                                             args.rule.scale, args.rule.softcap);
    }
  }

  // Prepared scores of a row become probabilities, zero where a product over `seen` reads what the
  // row does not see; its maximum and sum move on.
  PYMPA_INLINE void fold(int64_t row, float tile_max, float& largest, float& sum, Span seen) {
    // The product reads whole steps.
    constexpr int64_t kStep = Layout<T>::kKeyStep;
    const Span needed{seen.first / kStep * kStep, round_up(seen.last, kStep)};
    rescale[row] =
        fold_row<T>(scores + row * kScoreStride, visible[row], needed, tile_max, largest, sum);
  }

  // Both for the rows [first, last) of a strip, which together see `seen`. Maxima come first:
  // exponentials then need not wait for their own row's.
  PYMPA_NOINLINE void fold_strip(int64_t first, int64_t last, Span seen) {
    float tile_max[kRows];
    prepare(first, last, tile_max);
    for (int64_t row = first; row < last; ++row) {
      fold(row, tile_max[row - first], *row_max[row], *row_sum[row], seen);
    }
  }

  // Whether some value is not finite among the keys of `read` that some row does not see; all see
  // those of `seen_by_all`.
  bool masks_nonfinite(const KeyTile& tile, int64_t kv_head, Span read, Span seen_by_all) const {
    const Span hidden[] = {{read.first, min_of(read.last, seen_by_all.first)},
                           {max_of(read.first, seen_by_all.last), read.last}};
    SpecialValues<T> special;
    for (const Span& span : hidden) {
      for (int64_t key = span.first; key < span.last; ++key) {
        special.look_at(rows_of(tile.v, tile.row + key, kv_head), args.v_head_dim);
      }
    }
    return special.found();
  }
};

// Rows [row, row + rows) of those in hand share a K/V head; `column` is where products have them.
struct SharedHead {
  int64_t kv_head, row, rows, column;
};

// The K/V heads in hand where K and V are read from memory, and how far ahead to ask for them.
struct SharedHeads {
  SharedHead heads[kRows];
  int64_t count = 0, keys_ahead = 0;

  int64_t columns() const {
    return count > 0 ? heads[count - 1].column + heads[count - 1].rows : 0;
  }

  const SharedHead* begin() const { return heads; }
  const SharedHead* end() const { return heads + count; }

  // A row of an array of keys or values.
  struct Place {
    const HeadRows<const void>& array;
    int64_t row;
  };

  // What is read `keys_ahead` keys after row `row` of an array of which `left` keys are still to
  // come: its own rows, or those of the array after it.
  Place next_of(const HeadRows<const void>& array, int64_t row, int64_t left,
                const HeadRows<const void>& then, int64_t then_row) const {
    if (keys_ahead < left || !then.data) return {array, row + keys_ahead};
    return {then, then_row + keys_ahead - left};
  }
};

}  // namespace pympa::PYMPA_ISA
