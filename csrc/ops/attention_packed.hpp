// Attention of many rows: each key tile is packed once and used for all blocks of rows
// (FlashAttention order, Dao et al., 2022).
//
//   Q [rows of a block, head_dim] x K^T panel [head_dim, keys]  -> S float32 [rows, kKeyTile]
//   S -> P (rounded to the dtype), row_max, row_sum             [rows, kKeyTile]
//   P x V panel [keys, v_head_dim]                              -> out = out * rescale + partial
#pragma once

#if PYMPA_ISA_LEVEL == 4
#include "ops/attention_tiles_packed.hpp"
#endif
#include "ops/attention_vectors.hpp"

namespace pympa::PYMPA_ISA {

// Query rows [row, row + rows) and the heads that share one K/V head.
struct QueryBlock {
  int64_t row, rows, position;
  const int32_t* heads;
  int64_t head_count, kv_head;
};

template <class T>
struct PackedAttention : PackedProducts<T> {
  using Products = PackedProducts<T>;
  using Products::Products, Products::args, Products::strips, Products::flat_rows,
      Products::visible;
  static constexpr int64_t kStripRows = Products::kStripRows;

  // Fills in the rows of a block; returns the offsets that any of them sees.
  PYMPA_NOINLINE Span begin(const QueryBlock& block, const KeyTile& tile) {
    flat_rows = 0;
    Span seen{0, 0};
    for (int64_t row = 0; row < block.rows; ++row) {
      const Span span = visible_span(args.rule, block.position + row, tile.base, tile.span);
      seen = hull(seen, span);
      for (int64_t i = 0; i < block.head_count; ++i) {
        Span& strip = strips[flat_rows / kStripRows];
        if (flat_rows % kStripRows == 0) strip = {0, 0};
        strip = hull(strip, span);
        visible[flat_rows] = span;
        this->add_row(block.row + row, block.heads[i]);
      }
    }
    if (args.makes_scores) this->pack_queries();
    return seen;
  }

  // Whether some row does not see all that the product with values reads.
  bool reads_masked(const KeyTile& tile, Span seen) const {
    constexpr int64_t kStep = Layout<T>::kKeyStep;
    const Span whole{seen.first / kStep * kStep, round_up(seen.last, kStep)};
    const Span read = common(whole, tile.span);
    for (int64_t row = 0; row < flat_rows; ++row) {
      if (visible[row].first > read.first || visible[row].last < read.last) return true;
    }
    return false;
  }

  // `nonfinite`: among values that some row does not see, or, if products need finite ones, at all.
  void attend(const QueryBlock& block, const KeyTile& tile, bool nonfinite) {
    const Span seen = begin(block, tile);
    if (is_empty(seen)) return;
    const bool by_row = nonfinite && (Products::kNeedsFinite || reads_masked(tile, seen));
    this->attend_strips(tile, block.kv_head, seen, by_row);
  }

  // All keys of the sequence over query rows [first, last) of a range that begins at local `row`.
  void attend_rows(const TokenRange& range, int64_t row, int64_t first, int64_t last,
                   int64_t kv_head, const int32_t* heads, int64_t head_count) {
    const int64_t step = kRows / head_count;
    for_each_tile(args, range, first, last, [&](const KeyTile& in_pieces) {
      const KeyTile tile = this->gather(in_pieces, kv_head, kv_head + 1);
      this->pack(tile, kv_head);
      // Whole blocks, as they lie where all rows see the tile.
      const Span near = rows_that_see(args.rule, range, {first, last}, tile);
      const int64_t start = first + (near.first - first) / step * step;
      const int64_t stop = min_of(start + round_up(near.last - start, step), last);
      const auto seen_from = [&](int64_t at) {
        return visible_span(args.rule, range.start + at, tile.base, tile.span);
      };
      const Span seen_by_all = Products::kNeedsFinite
                                   ? Span{tile.span.last, tile.span.last}
                                   : common(seen_from(start), seen_from(stop - 1));
      const bool nonfinite =
          args.folds_scores && this->masks_nonfinite(tile, kv_head, tile.span, seen_by_all);
      for (int64_t at = start; at < stop; at += step) {
        attend({row + at, min_of(step, last - at), range.start + at, heads, head_count, kv_head},
               tile, nonfinite);
      }
    });
  }
};

}  // namespace pympa::PYMPA_ISA
