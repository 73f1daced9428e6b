// Attention of few rows (decoding): K and V are read into registers once and are never packed.
//
//   Q [rows, head_dim] x K^T block [head_dim, W keys]  -> S float32 [rows, kKeyTile]
//   S -> P (rounded to the dtype), row_max, row_sum    [rows, kKeyTile]
//   P x V [keys, v_head_dim]                           -> partial; out = out * rescale + partial
//
// Every sum has the same order as in the packed kernel, so the bits are the same. All K/V heads of
// a block of keys are processed before the next block: the heads of a row of K are adjacent, and
// memory is fastest in its own order.
//
// A team of threads processes the key tiles in waves, one tile for each thread: first scores; then,
// when all maxima are known, probabilities and partial outputs; then the partials are folded in the
// order of the tiles, as by one thread.
#pragma once

#include "cpu/parallel.hpp"
#include "cpu/stream.hpp"
#include "ops/attention_rows.hpp"

namespace pympa::PYMPA_ISA {

// Memory answers after some 100 ns: this much is asked for in advance, well inside L2.
constexpr int64_t kAheadBytes = 32 * 1024;

template <class T>
struct StreamedAttention : Rows<T> {
  using typename Rows<T>::Math;
  using typename Rows<T>::Group;
  using Rows<T>::args, Rows<T>::layout, Rows<T>::scores, Rows<T>::queries, Rows<T>::flat_rows,
      Rows<T>::out, Rows<T>::row_max, Rows<T>::row_sum, Rows<T>::rescale, Rows<T>::visible,
      Rows<T>::rows_of;
  using Keys = Transposed<Math, T>;

  // Rows that share a K/V head up to which this way is the faster one: pairs multiply twice as
  // fast, so packing pays for them earlier.
  static constexpr int64_t kFewRows = Math::kDepth == 2 ? 8 : 32;
  // Groups of values that meet a row's partial sum while it is in registers. One row leaves time
  // for little else than reading, and fewer streams of 16-bit values are read faster.
  static constexpr int kGroups = 8 / Math::kDepth;
  static constexpr int kGroupsOfOneRow = sizeof(T) == 4 ? kGroups : 2 / Math::kDepth;

  // Rows [row, row + rows) of those in hand share a K/V head.
  struct SharedHead {
    int64_t kv_head, row, rows;
  };

  // What a member of the team finds out about its tile, by row.
  struct TileResult {
    float tile_max[kRows], row_max[kRows], row_sum[kRows], rescale[kRows];
  };

  const int team, member;
  const int64_t partial_stride;
  int64_t head_count = 0, keys_ahead = 0;
  SharedHead heads[kRows];
  int64_t positions[kRows];

  StreamedAttention(const AttendArgs& call, int thread, int of_team, int as_member)
      : Rows<T>(call, thread),
        team(of_team),
        member(as_member),
        partial_stride(round_up(call.v_head_dim, W) + kPadding) {}

  // Partial outputs [kRows, partial_stride] of a member, in the place of packed values.
  float* partials_of(int who) const {
    return reinterpret_cast<float*>(this->values) +
           (who - member) * layout.bytes() / static_cast<int64_t>(sizeof(float));
  }

  TileResult& result_of(int who) const {
    return *reinterpret_cast<TileResult*>(partials_of(who) + kRows * partial_stride);
  }

  // The rows that are read `keys_ahead` keys after row `row` of an array of which `left` keys are
  // still to come: its own, or those of the array after it.
  struct Next {
    const HeadRows<const void>& array;
    int64_t row;
  };

  Next next_of(const HeadRows<const void>& array, int64_t row, int64_t left,
               const HeadRows<const void>& then, int64_t then_row) const {
    if (keys_ahead < left || !then.data) return {array, row + keys_ahead};
    return {then, then_row + keys_ahead - left};
  }

  template <bool kWhole>
  void score_block(const SharedHead& head, const KeyTile& tile, Span seen, int64_t at, int64_t i,
                   const Next& next) {
    if constexpr (kWhole) {
      const T* then = rows_of(next.array, next.row, head.kv_head) + i;
      for (int row = 0; row < W; ++row) prefetch(then + row * next.array.row);
    }
    Keys block;
    block.template load<kWhole>(rows_of(tile.k, tile.row + at, head.kv_head) + i, tile.k.row,
                                seen.first - at, seen.last - at, args.head_dim - i);
    const int64_t groups = groups_of<Math>(args.head_dim - i);
    const Group* q = queries + head.row * layout.query_stride + i / Math::kDepth;
    float* target = scores + head.row * kScoreStride + at;
    for_each_strip<4>(head.rows, [&]<int kCount>(int64_t row) {
      add_keys<Math, kCount, kWhole>(block, groups, i == 0, q + row * layout.query_stride,
                                     layout.query_stride, target + row * kScoreStride,
                                     kScoreStride);
    });
  }

  PYMPA_NOINLINE void score(const KeyTile& tile, Span seen) {
    constexpr int64_t kStep = Keys::kGroups * Math::kDepth;
    for (int64_t at = seen.first / W * W; at < seen.last; at += W) {
      const bool whole = at >= seen.first && at + W <= seen.last;
      const Next next =
          next_of(tile.k, tile.row + at, seen.last - at, tile.v, tile.row + seen.first);
      for (int64_t h = 0; h < head_count; ++h) {
        for (int64_t i = 0; i < args.head_dim; i += kStep) {
          if (whole && i + kStep <= args.head_dim) {
            score_block<true>(heads[h], tile, seen, at, i, next);
          } else {
            score_block<false>(heads[h], tile, seen, at, i, next);
          }
        }
      }
    }
  }

  template <int kStepGroups>
  PYMPA_NOINLINE void multiply_values(const KeyTile& tile, Span seen) {
    constexpr int64_t kStep = kStepGroups * Math::kDepth;
    const int64_t begin = seen.first / Math::kDepth * Math::kDepth;
    // Where the next tile's keys mostly are: asking in advance for others does no harm.
    const int64_t next_keys = tile.row + tile.span.last + (team - 1) * kKeyTile;
    int64_t step = 0;
    for (int64_t at = begin; at < seen.last; at += step) {
      const bool whole = at >= seen.first && at + kStep <= seen.last;
      step = whole ? kStep : Math::kDepth;
      const Next next = next_of(tile.v, tile.row + at, seen.last - at, tile.k, next_keys);
      for (int64_t h = 0; h < head_count; ++h) {
        const Values<T> values{rows_of(tile.v, tile.row + at, heads[h].kv_head),
                               rows_of(next.array, next.row, heads[h].kv_head), tile.v.row,
                               next.array.row, args.v_head_dim};
        for_each_strip<4>(heads[h].rows, [&]<int kCount>(int64_t strip) {
          const int64_t row = heads[h].row + strip;
          const Group* p =
              reinterpret_cast<const Group*>(scores + row * kScoreStride) + at / Math::kDepth;
          float* partial = partials_of(member) + row * partial_stride;
          if (whole) {
            add_values<Math, kCount, kStepGroups>(p, kScoreStride, values, at == begin, partial,
                                                  partial_stride);
          } else {
            add_group<Math, kCount>(p, kScoreStride, values, 0, seen.first - at, seen.last - at,
                                    at == begin, partial, partial_stride);
          }
        });
      }
    }
  }

  // `multiply_values` row by row, each with what it sees.
  PYMPA_NOINLINE void multiply_values_by_row(const KeyTile& tile, Span seen) {
    for (int64_t h = 0; h < head_count; ++h) {
      for (int64_t row = heads[h].row; row < heads[h].row + heads[h].rows; ++row) {
        float* partial = partials_of(member) + row * partial_stride;
        for (int64_t at = 0; at < args.v_head_dim; at += W) {
          store(partial + at, this->multiply_visible(tile, heads[h].kv_head, seen, row, at));
        }
      }
    }
  }

  bool masks_nonfinite(const KeyTile& tile, Span seen) const {
    Span seen_by_all = seen;
    for (int64_t row = 0; row < flat_rows; ++row) seen_by_all = common(seen_by_all, visible[row]);
    for (int64_t h = 0; h < head_count; ++h) {
      if (Rows<T>::masks_nonfinite(tile, heads[h].kv_head, seen, seen_by_all)) return true;
    }
    return false;
  }

  // Probabilities of the member's tile, which comes after those of the members before it.
  PYMPA_NOINLINE void fold_rows(Span seen) {
    TileResult& own = result_of(member);
    for (int64_t row = 0; row < flat_rows; ++row) {
      float largest = *row_max[row];
      for (int who = 0; who < member; ++who) {
        const float tile_max = result_of(who).tile_max[row];
        largest = largest > tile_max ? largest : tile_max;
      }
      own.row_max[row] = largest;
      own.row_sum[row] = 0.0f;
      this->fold(row, own.tile_max[row], own.row_max[row], own.row_sum[row], seen);
      own.rescale[row] = rescale[row];
    }
  }

  // Folds what the first `tiles` members found into rows [first, last) of the state.
  PYMPA_NOINLINE void absorb(int64_t first, int64_t last, int tiles) {
    for (int64_t row = first; row < last; ++row) {
      for (int who = 0; who < tiles; ++who) {
        const TileResult& found = result_of(who);
        *row_max[row] = found.row_max[row];
        *row_sum[row] = *row_sum[row] * found.rescale[row] + found.row_sum[row];
        const V scale = splat(found.rescale[row]);
        const float* partial = partials_of(who) + row * partial_stride;
        for (int64_t column = 0; column < args.v_head_dim; column += W) {
          const int64_t count = args.v_head_dim - column;
          float* target = out[row] + column;
          store(target, fma(load(target, count), scale, load(partial + column)), count);
        }
      }
    }
  }

  void wait() const {
    if (team > 1) wait_for_team();
  }

  // A wave of `tiles` tiles; `tile` is the member's own if it has one.
  void attend(KeyTile tile, int tiles) {
    Span seen{0, 0};
    if (member < tiles) {
      tile = this->gather(tile, 0, args.kv_heads);
      for (int64_t row = 0; row < flat_rows; ++row) {
        visible[row] = visible_span(args.rule, positions[row], tile.base, tile.span);
        seen = hull(seen, visible[row]);
      }
      if (args.makes_scores) score(tile, seen);
      if (args.scores.data) this->share_scores(tile);
      if (args.folds_scores) this->prepare(0, flat_rows, result_of(member).tile_max);
    }
    if (!args.folds_scores) return;
    wait();
    if (member < tiles) {
      fold_rows(seen);
      if (masks_nonfinite(tile, seen)) {
        multiply_values_by_row(tile, seen);
      } else {
        flat_rows == head_count ? multiply_values<kGroupsOfOneRow>(tile, seen)
                                : multiply_values<kGroups>(tile, seen);
      }
    }
    wait();
    absorb(flat_rows * member / team, flat_rows * (member + 1) / team, tiles);
  }

  // Takes the rows of `range`, which begins at local `row`, for K/V heads from `kv_head` on as far
  // as they fit; returns the first that did not.
  int64_t take_rows(const TokenRange& range, int64_t row, int64_t kv_head) {
    flat_rows = head_count = 0;
    for (; kv_head < args.kv_heads && flat_rows + kFewRows <= kRows; ++kv_head) {
      const int64_t first = flat_rows;
      for (int64_t r = 0; r < range.length; ++r) {
        for (int64_t head = 0; head < args.heads; ++head) {
          if (args.kv_head_of_q[head] != kv_head) continue;
          positions[flat_rows] = range.start + r;
          this->add_row(row + r, head);
        }
      }
      if (flat_rows > first) heads[head_count++] = {kv_head, first, flat_rows - first};
    }
    if (head_count > 0) {
      const int64_t bytes = (heads[head_count - 1].kv_head - heads[0].kv_head + 1) *
                            max_of(args.head_dim, args.v_head_dim) *
                            static_cast<int64_t>(sizeof(T));
      keys_ahead = round_up(min_of(kAheadBytes / bytes + 1, kKeyTile), W);
    }
    return kv_head;
  }

  // All keys of the sequence over the rows of a range that begins at local `row`. Every member of
  // the team makes this call.
  void attend_rows(const TokenRange& range, int64_t row) {
    for (int64_t kv_head = 0; kv_head < args.kv_heads;) {
      kv_head = take_rows(range, row, kv_head);
      KeyTile own{};
      int tiles = 0;
      for_each_tile(args, range, 0, range.length, [&](const KeyTile& tile) {
        if (tiles == member) own = tile;
        if (++tiles < team) return;
        attend(own, tiles);
        tiles = 0;
      });
      if (tiles > 0) attend(own, tiles);
      wait();
    }
  }
};

}  // namespace pympa::PYMPA_ISA
