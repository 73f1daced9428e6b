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

constexpr int64_t kRows = 96;  // rows x heads of a block: S stays in L2 beside K and V
constexpr int64_t kStrips = kRows / kStrip;
constexpr int64_t kPadding = 16;  // keeps rows off a power-of-two stride (L1 associativity)
constexpr int64_t kScoreStride = kKeyTile + kPadding;
constexpr int64_t kAlignment = 64;

template <class Math>
int64_t groups_of(int64_t length) {
  return (length + Math::kDepth - 1) / Math::kDepth;
}

// Sizes of one thread's scratch, in 4-byte elements.
template <class T>
struct Layout {
  using Math = typename MathOf<T>::Attention;
  int64_t query_stride, key_panel, value_panel, queries, keys, values;

  Layout(int64_t head_dim, int64_t v_head_dim)
      : query_stride(round_up(groups_of<Math>(head_dim), W) + kPadding),
        key_panel(groups_of<Math>(head_dim) * kPanel),
        value_panel(kKeyTile / Math::kDepth * kPanel),
        queries(kRows * query_stride),
        keys(kKeyTile / kPanel * key_panel),
        values((v_head_dim + kPanel - 1) / kPanel * value_panel) {}

  int64_t bytes() const {
    const int64_t elements = kRows * kScoreStride + queries + keys + values;
    return round_up(elements * static_cast<int64_t>(sizeof(float)), kAlignment);
  }
};

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

// One thread's scratch, and the rows in hand by flat number. Each step is a function of its own in
// the binary too, so that its loops get all registers and a profile tells the steps apart.
template <class T>
struct Rows {
  using Math = typename MathOf<T>::Attention;
  using Group = typename Math::Group;
  using Stored = typename Math::Stored;

  const AttendArgs& args;
  const Layout<T> layout;
  float* scores;
  Group* queries;
  Stored* keys;
  Stored* values;

  int64_t flat_rows = 0;
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
    keys = reinterpret_cast<Stored*>(scores + kRows * kScoreStride);
    values = keys + layout.keys;
    queries = reinterpret_cast<Group*>(values + layout.values);
  }

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
    if (args.makes_scores) {
      pack_row<Math>(rows_of(args.q, row, head), args.head_dim,
                     queries + flat * layout.query_stride);
    }
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

  // Visible scores, from the scratch to the caller's array or back.
  PYMPA_NOINLINE void share_scores(const KeyTile& tile) {
    for (int64_t row = 0; row < flat_rows; ++row) {
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
      tile_max[row] = prepare_row<T>(scores + row * kScoreStride, visible[row], args.rule.scale,
                                     args.rule.softcap);
    }
  }

  // Prepared scores of a row become probabilities, zero where a product over `seen` reads what the
  // row does not see; its maximum and sum move on.
  PYMPA_INLINE void fold(int64_t row, float tile_max, float& largest, float& sum, Span seen) {
    // The product reads whole groups, so a pair's other half must be zero.
    const Span needed{seen.first / Math::kDepth * Math::kDepth, round_up(seen.last, Math::kDepth)};
    rescale[row] =
        fold_row<T>(scores + row * kScoreStride, visible[row], needed, tile_max, largest, sum);
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

  // A vector of one row's product over `read`, with zeros for the values that the row does not see.
  V multiply_visible(const KeyTile& tile, int64_t kv_head, Span read, int64_t row,
                     int64_t column) const {
    constexpr int kDepth = Math::kDepth;
    const T* values = rows_of(tile.v, tile.row, kv_head) + column;
    const Group* p = reinterpret_cast<const Group*>(scores + row * kScoreStride);
    const Span seen = visible[row];
    V sum{};
    for (int64_t key = read.first / kDepth * kDepth; key < read.last; key += kDepth) {
      typename Math::Lanes lanes{};
      if (key + kDepth > seen.first && key < seen.last) {
        lanes = load_group<Math>(values, tile.v.row, key, seen.first, seen.last,
                                 args.v_head_dim - column);
      }
      sum = Math::dot(sum, Math::broadcast(p + key / kDepth), lanes);
    }
    return sum;
  }
};

}  // namespace pympa::PYMPA_ISA
