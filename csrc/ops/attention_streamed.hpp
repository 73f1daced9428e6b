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
#if PYMPA_ISA_LEVEL == 4
#include "ops/attention_tiles_streamed.hpp"
#endif
#include "ops/attention_vectors.hpp"

namespace pympa::PYMPA_ISA {

// Memory answers after some 100 ns: this much is asked for in advance, well inside L2.
constexpr int64_t kAheadBytes = 32 * 1024;

template <class T>
struct StreamedAttention : StreamedProducts<T> {
  using Products = StreamedProducts<T>;
  using Products::args, Products::layout, Products::flat_rows, Products::out, Products::row_max,
      Products::row_sum, Products::rescale, Products::visible, Products::heads,
      Products::partial_stride, Products::kFewRows;

  // What a member of the team finds out about its tile, by row.
  struct TileResult {
    float tile_max[kRows], row_max[kRows], row_sum[kRows], rescale[kRows];
  };

  const int team, member;
  int64_t positions[kRows];

  StreamedAttention(const AttendArgs& call, int thread, int of_team, int as_member)
      : Products(call, thread), team(of_team), member(as_member) {}

  // Partial outputs of a member.
  float* partials_of(int who) const {
    return this->partials() + (who - member) * layout.bytes() / static_cast<int64_t>(sizeof(float));
  }

  TileResult& result_of(int who) const {
    return *reinterpret_cast<TileResult*>(partials_of(who) + kRows * partial_stride);
  }

  // Whether values that are not finite are among those that some row does not see, or, if products
  // need finite ones, at all.
  bool nonfinite(const KeyTile& tile, Span seen) const {
    Span seen_by_all = seen;
    for (int64_t row = 0; row < flat_rows; ++row) seen_by_all = common(seen_by_all, visible[row]);
    if (Products::kNeedsFinite) seen_by_all = {seen.last, seen.last};
    for (const SharedHead& head : heads) {
      if (this->masks_nonfinite(tile, head.kv_head, seen, seen_by_all)) return true;
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
      if (args.makes_scores) this->score(tile, seen);
      if (args.scores.data) this->share_scores(tile, 0, flat_rows);
      if (args.folds_scores) this->prepare(0, flat_rows, result_of(member).tile_max);
    }
    if (!args.folds_scores) return;
    wait();
    if (member < tiles) {
      fold_rows(seen);
      // Where the next tile's keys mostly are: asking in advance for others does no harm.
      const int64_t next_keys = tile.row + tile.span.last + (team - 1) * kKeyTile;
      nonfinite(tile, seen) ? this->multiply_values_by_row(tile, seen)
                            : this->multiply_values(tile, seen, next_keys);
    }
    wait();
    absorb(flat_rows * member / team, flat_rows * (member + 1) / team, tiles);
  }

  // Takes the rows of `range`, which begins at local `row`, for K/V heads from `kv_head` on as far
  // as they fit; returns the first that did not.
  int64_t take_rows(const TokenRange& range, int64_t row, int64_t kv_head) {
    flat_rows = heads.count = 0;
    for (; kv_head < args.kv_heads; ++kv_head) {
      if (Products::column_for(heads.columns(), kFewRows) + kFewRows > kRows) break;
      const int64_t first = flat_rows;
      for (int64_t r = 0; r < range.length; ++r) {
        for (int64_t head = 0; head < args.heads; ++head) {
          if (args.kv_head_of_q[head] != kv_head) continue;
          positions[flat_rows] = range.start + r;
          this->add_row(row + r, head);
        }
      }
      const int64_t rows = flat_rows - first;
      if (rows == 0) continue;
      const int64_t column = Products::column_for(heads.columns(), rows);
      heads.heads[heads.count++] = {kv_head, first, rows, column};
    }
    if (args.makes_scores) this->pack_queries();
    if (heads.count > 0) {
      const int64_t bytes = (heads.end()[-1].kv_head - heads.begin()->kv_head + 1) *
                            max_of(args.head_dim, args.v_head_dim) *
                            static_cast<int64_t>(sizeof(T));
      heads.keys_ahead = round_up(min_of(kAheadBytes / bytes + 1, kKeyTile), W);
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
