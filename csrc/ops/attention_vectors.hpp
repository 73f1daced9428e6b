// Both products of attention in vector registers.
#pragma once

#include "cpu/stream.hpp"
#include "ops/attention_rows.hpp"

namespace pympa::PYMPA_ISA {

// Values of whole panels of avx512: amx_bf16 has its kernels for float32, and amx_emulated its
// sizes.
constexpr int64_t kWidestPanel = PYMPA_ISA_LEVEL == 4 ? 4 * W : kPanel;

// Sizes of one thread's scratch, in 4-byte elements.
template <class T>
struct Layout<T, false> {
  using Math = typename MathOf<T>::Attention;
  static constexpr int64_t kKeyStep = Math::kDepth;

  int64_t query_stride, key_panel, value_panel, queries, keys, values;

  Layout(int64_t head_dim, int64_t v_head_dim)
      : query_stride(round_up(groups_of<Math>(head_dim), W) + kPadding),
        key_panel(groups_of<Math>(head_dim) * kPanel),
        value_panel(kKeyTile / Math::kDepth * kPanel),
        queries(kRows * query_stride),
        keys(kKeyTile / kPanel * key_panel),
        values(round_up(v_head_dim, kWidestPanel) / kPanel * value_panel) {}

  int64_t bytes() const {
    const int64_t elements = kRows * kScoreStride + queries + keys + values;
    return round_up(elements * static_cast<int64_t>(sizeof(float)), kAlignment);
  }
};

template <class T>
struct VectorRows : Rows<T> {
  using Math = typename MathOf<T>::Attention;
  using Group = typename Math::Group;
  using Stored = typename Math::Stored;
  using Rows<T>::args, Rows<T>::layout, Rows<T>::scores, Rows<T>::visible, Rows<T>::rows_of;

  Stored* keys;
  Stored* values;
  Group* queries;

  VectorRows(const AttendArgs& call, int thread) : Rows<T>(call, thread) {
    keys = reinterpret_cast<Stored*>(this->scratch());
    values = keys + layout.keys;
    queries = reinterpret_cast<Group*>(values + layout.values);
  }

  void pack_queries() {
    for (int64_t row = 0; row < this->flat_rows; ++row) {
      pack_row<Math>(this->queries_of[row], args.head_dim, queries + row * layout.query_stride);
    }
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

// Of many rows: K and V in panels, each of which meets all strips of rows before the next one.
template <class T>
struct PackedProducts<T, false> : VectorRows<T> {
  using typename VectorRows<T>::Math;
  using typename VectorRows<T>::Group;
  using VectorRows<T>::VectorRows, VectorRows<T>::args, VectorRows<T>::layout,
      VectorRows<T>::scores, VectorRows<T>::queries, VectorRows<T>::keys, VectorRows<T>::values,
      VectorRows<T>::flat_rows, VectorRows<T>::out, VectorRows<T>::rescale, VectorRows<T>::rows_of;

  static constexpr int64_t kStripRows = kStrip;
  static constexpr int64_t kChunkBytes = INT64_MAX;  // arithmetic takes longer than reading
  static constexpr bool kNeedsFinite = false;  // values that are not finite need nothing special

  Span strips[kRows / kStripRows];  // what each strip of rows sees

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

  // All that rows do with a tile of which they see `seen`.
  void attend_strips(const KeyTile& tile, int64_t kv_head, Span seen, bool by_row) {
    if (args.makes_scores) score(seen);
    if (args.scores.data) this->share_scores(tile, 0, flat_rows);
    if (!args.folds_scores) return;
    for (int64_t row = 0; row < flat_rows; row += kStrip) {
      const Span strip = strips[row / kStrip];
      if (!is_empty(strip)) this->fold_strip(row, min_of(row + kStrip, flat_rows), strip);
    }
    by_row ? multiply_values_by_row(tile, kv_head) : multiply_values();
  }
};

// Of few rows: K and V are read into registers once.
template <class T>
struct StreamedProducts<T, false> : VectorRows<T> {
  using typename VectorRows<T>::Math;
  using typename VectorRows<T>::Group;
  using VectorRows<T>::args, VectorRows<T>::layout, VectorRows<T>::scores, VectorRows<T>::queries,
      VectorRows<T>::rows_of;
  using Keys = Transposed<Math, T>;

  // Rows that share a K/V head up to which this way is the faster one: pairs multiply twice as
  // fast, so packing pays for them earlier.
  static constexpr int64_t kFewRows = Math::kDepth == 2 ? 8 : 32;
  static constexpr bool kNeedsFinite = false;  // values that are not finite need nothing special
  // The number of groups of values that are added while a row's partial sum is in registers. With
  // one row reading is most of the work, and fewer streams of 16-bit values are read faster.
  static constexpr int kGroups = 8 / Math::kDepth;
  static constexpr int kGroupsOfOneRow = sizeof(T) == 4 ? kGroups : 2 / Math::kDepth;

  const int64_t partial_stride;
  SharedHeads heads;

  StreamedProducts(const AttendArgs& call, int thread)
      : VectorRows<T>(call, thread), partial_stride(round_up(call.v_head_dim, W) + kPadding) {}

  static int64_t column_for(int64_t taken, int64_t) { return taken; }

  // Partial outputs [kRows, partial_stride], in the place of packed values.
  float* partials() const { return reinterpret_cast<float*>(this->values); }

  template <bool kWhole>
  void score_block(const SharedHead& head, const KeyTile& tile, Span seen, int64_t at, int64_t i,
                   const SharedHeads::Place& next) {
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
      const SharedHeads::Place next =
          heads.next_of(tile.k, tile.row + at, seen.last - at, tile.v, tile.row + seen.first);
      for (const SharedHead& head : heads) {
        for (int64_t i = 0; i < args.head_dim; i += kStep) {
          if (whole && i + kStep <= args.head_dim) {
            score_block<true>(head, tile, seen, at, i, next);
          } else {
            score_block<false>(head, tile, seen, at, i, next);
          }
        }
      }
    }
  }

  template <int kStepGroups>
  PYMPA_NOINLINE void multiply_groups(const KeyTile& tile, Span seen, int64_t next_keys) {
    constexpr int64_t kStep = kStepGroups * Math::kDepth;
    const int64_t begin = seen.first / Math::kDepth * Math::kDepth;
    int64_t step = 0;
    for (int64_t at = begin; at < seen.last; at += step) {
      const bool whole = at >= seen.first && at + kStep <= seen.last;
      step = whole ? kStep : Math::kDepth;
      const SharedHeads::Place next =
          heads.next_of(tile.v, tile.row + at, seen.last - at, tile.k, next_keys);
      for (const SharedHead& head : heads) {
        const Values<T> values{rows_of(tile.v, tile.row + at, head.kv_head),
                               rows_of(next.array, next.row, head.kv_head), tile.v.row,
                               next.array.row, args.v_head_dim};
        for_each_strip<4>(head.rows, [&]<int kCount>(int64_t strip) {
          const int64_t row = head.row + strip;
          const Group* p =
              reinterpret_cast<const Group*>(scores + row * kScoreStride) + at / Math::kDepth;
          float* partial = partials() + row * partial_stride;
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

  // The partial outputs of a tile; the next one's keys are `next_keys`.
  void multiply_values(const KeyTile& tile, Span seen, int64_t next_keys) {
    this->flat_rows == heads.count ? multiply_groups<kGroupsOfOneRow>(tile, seen, next_keys)
                                   : multiply_groups<kGroups>(tile, seen, next_keys);
  }

  // `multiply_values` row by row, each with what it sees.
  PYMPA_NOINLINE void multiply_values_by_row(const KeyTile& tile, Span seen) {
    for (const SharedHead& head : heads) {
      for (int64_t row = head.row; row < head.row + head.rows; ++row) {
        float* partial = partials() + row * partial_stride;
        for (int64_t at = 0; at < args.v_head_dim; at += W) {
          store(partial + at, this->multiply_visible(tile, head.kv_head, seen, row, at));
        }
      }
    }
  }
};

}  // namespace pympa::PYMPA_ISA
