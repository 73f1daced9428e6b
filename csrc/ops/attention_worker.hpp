// Attention of packed rows, one key tile after the other (FlashAttention order, Dao et al., 2022).
//
//   Q [rows of a block, head_dim] x K^T panel [head_dim, keys]  -> S float32 [rows, kKeyTile]
//   S -> P (rounded to the dtype), row_max, row_sum             [rows, kKeyTile]
//   P x V panel [keys, v_head_dim]                              -> out = out * rescale + partial
//
// Key tiles start at multiples of kKeyTile of the global position in the sequence, and a place in a
// tile is an absolute offset, so a row's bits depend on its own position and on the keys it sees:
// not on other rows, later keys, chunking or threads. A product that skips masked keys leaves out
// exact zeros only.
//
// A score tile ends with S and a fold tile begins with it: the caller's array stands between them.
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

// Keys [first, last) of one tile; `base` is the global position of offset 0 and `row` its local
// row, which may lie before the array where a range starts inside a tile.
struct KeyTile {
  int64_t base, row;
  Span span;
};

// Query rows [row, row + rows) and the heads that share one K/V head.
struct QueryBlock {
  int64_t row, rows, position;
  const int32_t* heads;
  int64_t head_count;
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

PYMPA_INLINE bool is_empty(Span span) { return span.last <= span.first; }

PYMPA_INLINE Span hull(Span a, Span b) {
  if (is_empty(a)) return b;
  if (is_empty(b)) return a;
  return {min_of(a.first, b.first), max_of(a.last, b.last)};
}

// One thread's scratch and the folding of blocks with it. Each step is a function of its own in the
// binary too, so that its loops get all registers and a profile tells the steps apart.
template <class T>
struct Worker {
  using Math = typename MathOf<T>::Attention;
  using Group = typename Math::Group;
  using Stored = typename Math::Stored;

  const AttendArgs& args;
  Layout<T> layout;
  float* scores;
  Group* queries;
  Stored* keys;
  Stored* values;

  // Of the block in hand, by flat row (row-major over rows, then heads) and by strip of rows.
  int64_t flat_rows = 0;
  float* shared[kRows];  // the caller's scores, at offset 0 of the tile
  float* out[kRows];
  float* row_max[kRows];
  float* row_sum[kRows];
  float rescale[kRows];
  Span visible[kRows];
  Span strips[kStrips];

  Worker(const AttendArgs& call, int thread) : args(call), layout(call.head_dim, call.v_head_dim) {
    const int64_t base = round_up(reinterpret_cast<int64_t>(call.workspace), kAlignment);
    scores = reinterpret_cast<float*>(base + thread * layout.bytes());
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

  PYMPA_NOINLINE void pack(const KeyTile& tile, int64_t kv_head) {
    if (args.makes_scores) pack_keys(tile, rows_of(args.k, tile.row, kv_head));
    if (args.folds_scores) {
      pack_values<Math>(rows_of(args.v, tile.row, kv_head), args.v.row, tile.span.first,
                        tile.span.last, args.v_head_dim, layout.value_panel, values);
    }
  }

  void pack_keys(const KeyTile& tile, const T* k) {
    for (int64_t at = tile.span.first / kPanel * kPanel; at < tile.span.last; at += kPanel) {
      pack_transposed<Math>(k + at * args.k.row, args.k.row, tile.span.first - at,
                            tile.span.last - at, args.head_dim,
                            keys + at / kPanel * layout.key_panel);
    }
  }

  // Fills in the rows of a block; returns the offsets that any of them sees.
  PYMPA_NOINLINE Span begin(const QueryBlock& block, const KeyTile& tile) {
    flat_rows = block.rows * block.head_count;
    Span seen{0, 0};
    for (int64_t flat = 0; flat < flat_rows; ++flat) {
      const int64_t row = block.row + flat / block.head_count;
      const int64_t head = block.heads[flat % block.head_count];
      const int64_t position = block.position + flat / block.head_count;
      if (flat % kStrip == 0) strips[flat / kStrip] = {0, 0};
      visible[flat] = visible_span(args.rule, position, tile.base, tile.span);
      strips[flat / kStrip] = hull(strips[flat / kStrip], visible[flat]);
      seen = hull(seen, visible[flat]);
      if (args.scores.data) shared[flat] = rows_of(args.scores, row, head) + tile.row;
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
    return seen;
  }

  PYMPA_NOINLINE void score(Span seen) {
    const int64_t groups = groups_of<Math>(args.head_dim);
    for (int64_t at = seen.first / kPanel * kPanel; at < seen.last; at += kPanel) {
      for (int64_t row = 0; row < flat_rows; row += kStrip) {
        const Span strip = strips[row / kStrip];
        if (strip.last <= at || strip.first >= at + kPanel) continue;
        const int vectors = static_cast<int>(min_of(kPanel, strip.last - at) + W - 1) / W;
        const int rows = static_cast<int>(min_of(kStrip, flat_rows - row));
        float* target = scores + row * kScoreStride + at;
        any_tile<Math>(rows, vectors, queries + row * layout.query_stride, layout.query_stride,
                       keys + at / kPanel * layout.key_panel, groups, [&](int r, int v, V sums) {
                         store(target + r * kScoreStride + v * W, sums);
                       });
      }
    }
  }

  // Visible scores, from the scratch to the caller's array or back.
  PYMPA_NOINLINE void share_scores() {
    for (int64_t row = 0; row < flat_rows; ++row) {
      const int64_t first = visible[row].first, count = visible[row].last - first;
      if (count <= 0) continue;
      float *ours = scores + row * kScoreStride + first, *theirs = shared[row] + first;
      const size_t bytes = static_cast<size_t>(count) * sizeof(float);
      __builtin_memcpy(args.makes_scores ? theirs : ours, args.makes_scores ? ours : theirs, bytes);
    }
  }

  PYMPA_NOINLINE void fold() {
    for (int64_t at = 0; at < flat_rows; at += kStrip) {
      const Span strip = strips[at / kStrip];
      if (is_empty(strip)) continue;
      // The product reads whole groups, so a pair's other half must be zero.
      const Span needed{strip.first / Math::kDepth * Math::kDepth,
                        round_up(strip.last, Math::kDepth)};
      // The strip's maxima first: exponentials then need not wait for their own row's.
      float tile_max[kStrip];
      const int64_t rows = min_of(kStrip, flat_rows - at);
      for (int64_t r = 0; r < rows; ++r) {
        tile_max[r] = prepare_row<T>(scores + (at + r) * kScoreStride, visible[at + r],
                                     args.rule.scale, args.rule.softcap);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = at + r;
        rescale[row] = fold_row<T>(scores + row * kScoreStride, visible[row], needed, tile_max[r],
                                   *row_max[row], *row_sum[row]);
      }
    }
  }

  PYMPA_NOINLINE void weigh() {
    for (int64_t at = 0; at < args.v_head_dim; at += kPanel) {
      const int64_t columns = min_of(kPanel, args.v_head_dim - at);
      const int vectors = static_cast<int>(columns + W - 1) / W;
      for (int64_t row = 0; row < flat_rows; row += kStrip) {
        const Span strip = strips[row / kStrip];
        if (is_empty(strip)) continue;
        const int64_t first = strip.first / Math::kDepth;
        const int64_t groups = groups_of<Math>(strip.last) - first;
        const Group* p = reinterpret_cast<const Group*>(scores + row * kScoreStride) + first;
        const int rows = static_cast<int>(min_of(kStrip, flat_rows - row));
        any_tile<Math>(rows, vectors, p, kScoreStride,
                       values + at / kPanel * layout.value_panel + first * kPanel, groups,
                       [&](int r, int v, V sums) {
                         float* target = out[row + r] + at + v * W;
                         const int64_t count = columns - v * W;
                         const V old = load(target, count);
                         store(target, fma(old, splat(rescale[row + r]), sums), count);
                       });
      }
    }
  }

  void attend(const QueryBlock& block, const KeyTile& tile) {
    const Span seen = begin(block, tile);
    if (is_empty(seen)) return;
    if (args.makes_scores) score(seen);
    if (args.scores.data) share_scores();
    if (!args.folds_scores) return;
    fold();
    weigh();
  }

  // All keys of the sequence over query rows [first, last) of a range that begins at local `row`.
  void attend_rows(const TokenRange& range, int64_t row, int64_t first, int64_t last,
                   int64_t kv_head, const int32_t* heads, int64_t head_count) {
    const int64_t step = kRows / head_count;
    int64_t k_row = 0;
    for (int64_t i = 0; i < args.k_range_count; k_row += args.k_ranges[i].length, ++i) {
      const TokenRange& k_range = args.k_ranges[i];
      if (k_range.sequence != range.sequence) continue;
      const int64_t k_end = k_range.start + k_range.length;
      for (int64_t base = k_range.start / kKeyTile * kKeyTile; base < k_end; base += kKeyTile) {
        Span span{max_of(k_range.start - base, 0), min_of(k_end - base, kKeyTile)};
        span.first = visible_span(args.rule, range.start + first, base, span).first;
        span.last = visible_span(args.rule, range.start + last - 1, base, span).last;
        if (is_empty(span)) continue;
        const KeyTile tile{base, k_row + base - k_range.start, span};
        pack(tile, kv_head);
        for (int64_t at = first; at < last; at += step) {
          attend({row + at, min_of(step, last - at), range.start + at, heads, head_count}, tile);
        }
      }
    }
  }
};

}  // namespace pympa::PYMPA_ISA
