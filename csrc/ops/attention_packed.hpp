// Attention of many rows: each key tile is packed once and used for all blocks of rows
// (FlashAttention order, Dao et al., 2022).
//
//   Q [rows of a block, head_dim] x K^T panel [head_dim, keys]  -> S float32 [rows, kKeyTile]
//   S -> P (rounded to the dtype), row_max, row_sum             [rows, kKeyTile]
//   P x V panel [keys, v_head_dim]                              -> out = out * rescale + partial
#pragma once

#include "ops/attention_rows.hpp"

namespace pympa::PYMPA_ISA {

// Query rows [row, row + rows) and the heads that share one K/V head.
struct QueryBlock {
  int64_t row, rows, position;
  const int32_t* heads;
  int64_t head_count, kv_head;
};

template <class T>
struct PackedAttention : Rows<T> {
  using typename Rows<T>::Math;
  using typename Rows<T>::Group;
  using Rows<T>::Rows, Rows<T>::args, Rows<T>::layout, Rows<T>::scores, Rows<T>::queries,
      Rows<T>::keys, Rows<T>::values, Rows<T>::flat_rows, Rows<T>::out, Rows<T>::rescale,
      Rows<T>::visible, Rows<T>::row_max, Rows<T>::row_sum, Rows<T>::rows_of;

  Span strips[kStrips];  // what each strip of rows sees

  PYMPA_NOINLINE void pack(const KeyTile& tile, int64_t kv_head) {
    if (args.makes_scores) pack_keys(tile, rows_of(tile.k, tile.row, kv_head));
    if (args.folds_scores) {
      pack_values<Math>(rows_of(tile.v, tile.row, kv_head), tile.v.row, tile.span.first,
                        tile.span.last, args.v_head_dim, layout.value_panel, values);
    }
  }

  void pack_keys(const KeyTile& tile, const T* k) {
    for (int64_t at = tile.span.first / kPanel * kPanel; at < tile.span.last; at += kPanel) {
      pack_transposed<Math>(k + at * tile.k.row, tile.k.row, tile.span.first - at,
                            tile.span.last - at, args.head_dim,
                            keys + at / kPanel * layout.key_panel);
    }
  }

  // Fills in the rows of a block; returns the offsets that any of them sees.
  PYMPA_NOINLINE Span begin(const QueryBlock& block, const KeyTile& tile) {
    flat_rows = 0;
    Span seen{0, 0};
    for (int64_t row = 0; row < block.rows; ++row) {
      const Span span = visible_span(args.rule, block.position + row, tile.base, tile.span);
      seen = hull(seen, span);
      for (int64_t i = 0; i < block.head_count; ++i) {
        Span& strip = strips[flat_rows / kStrip];
        if (flat_rows % kStrip == 0) strip = {0, 0};
        strip = hull(strip, span);
        visible[flat_rows] = span;
        this->add_row(block.row + row, block.heads[i]);
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

  PYMPA_NOINLINE void fold_strips() {
    float tile_max[kRows];
    for (int64_t at = 0; at < flat_rows; at += kStrip) {
      const Span strip = strips[at / kStrip];
      if (is_empty(strip)) continue;
      const int64_t last = min_of(at + kStrip, flat_rows);
      // The strip's maxima first: exponentials then need not wait for their own row's.
      this->prepare(at, last, tile_max);
      for (int64_t row = at; row < last; ++row) {
        this->fold(row, tile_max[row], *row_max[row], *row_sum[row], strip);
      }
    }
  }

  PYMPA_NOINLINE void multiply_values() {
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

  // Whether some row does not see all that `multiply_values` reads.
  bool reads_masked(const KeyTile& tile, Span seen) const {
    const Span whole{seen.first / Math::kDepth * Math::kDepth, round_up(seen.last, Math::kDepth)};
    const Span read = common(whole, tile.span);
    for (int64_t row = 0; row < flat_rows; ++row) {
      if (visible[row].first > read.first || visible[row].last < read.last) return true;
    }
    return false;
  }

  // `multiply_values` row by row, each with what it sees.
  PYMPA_NOINLINE void multiply_values_by_row(const KeyTile& tile, int64_t kv_head) {
    for (int64_t row = 0; row < flat_rows; ++row) {
      const Span strip = strips[row / kStrip];
      if (is_empty(strip)) continue;
      for (int64_t at = 0; at < args.v_head_dim; at += W) {
        const V sums = this->multiply_visible(tile, kv_head, strip, row, at);
        const int64_t count = args.v_head_dim - at;
        float* target = out[row] + at;
        store(target, fma(load(target, count), splat(rescale[row]), sums), count);
      }
    }
  }

  void attend(const QueryBlock& block, const KeyTile& tile, bool masks_nonfinite) {
    const Span seen = begin(block, tile);
    if (is_empty(seen)) return;
    if (args.makes_scores) score(seen);
    if (args.scores.data) this->share_scores(tile);
    if (!args.folds_scores) return;
    fold_strips();
    if (masks_nonfinite && reads_masked(tile, seen))
      return multiply_values_by_row(tile, block.kv_head);
    multiply_values();
  }

  // All keys of the sequence over query rows [first, last) of a range that begins at local `row`.
  void attend_rows(const TokenRange& range, int64_t row, int64_t first, int64_t last,
                   int64_t kv_head, const int32_t* heads, int64_t head_count) {
    const int64_t step = kRows / head_count;
    for_each_tile(args, range, first, last, [&](const KeyTile& in_pieces) {
      const KeyTile tile = this->gather(in_pieces, kv_head, kv_head + 1);
      pack(tile, kv_head);
      // Whole blocks, as they lie where all rows see the tile.
      const Span near = rows_that_see(args.rule, range, {first, last}, tile);
      const int64_t start = first + (near.first - first) / step * step;
      const int64_t stop = min_of(start + round_up(near.last - start, step), last);
      const auto seen_from = [&](int64_t at) {
        return visible_span(args.rule, range.start + at, tile.base, tile.span);
      };
      const Span seen_by_all = common(seen_from(start), seen_from(stop - 1));
      const bool masks_nonfinite =
          args.folds_scores && this->masks_nonfinite(tile, kv_head, tile.span, seen_by_all);
      for (int64_t at = start; at < stop; at += step) {
        attend({row + at, min_of(step, last - at), range.start + at, heads, head_count, kv_head},
               tile, masks_nonfinite);
      }
    });
  }
};

}  // namespace pympa::PYMPA_ISA
