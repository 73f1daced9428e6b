// The loop of a block over the key tiles that its rows see; it loads tiles while it computes
// others.
//
// K and V have one buffer each. V of a tile is loaded while its scores are computed, and K of the
// next tile during the softmax and the product with V, with two barriers for each tile.
#pragma once

#include "ops/attention_nonfinite_cuda.hpp"

namespace pympa::cuda {

// Shared memory of a block; V lies in K's place where there is `one_buffer`.
template <class Shape>
struct Buffers {
  unsigned char *q, *k, *v, *p;
  float* maxima;

  __device__ __forceinline__ explicit Buffers(const AttendParams& params) {
    const int panels = panels_of_k<Shape>(params);
    const bool one_buffer = has_one_buffer<Shape>(params);
    q = dynamic_shared();
    k = q + panels * Shape::kRows * kRowBytes;
    v = one_buffer ? k : k + panels * kKeys * kRowBytes;
    p = v + (one_buffer ? max(panels * kKeys * kRowBytes, Shape::kVBytes) : Shape::kVBytes);
    maxima = reinterpret_cast<float*>(p + Shape::kPBytes);
  }
};

template <class Shape>
int shared_bytes(int head_dim, bool one_buffer) {
  const int k_bytes = panels_of(head_dim) * kKeys * kRowBytes;
  const int kv_bytes = one_buffer ? std::max(k_bytes, Shape::kVBytes) : k_bytes + Shape::kVBytes;
  return panels_of(head_dim) * Shape::kRows * kRowBytes + kv_bytes + Shape::kPBytes +
         Shape::kMaximaBytes;
}

__device__ __forceinline__ const std::uint16_t* row_of(const HeadRows<const void>& array,
                                                       std::int64_t row, int head) {
  return static_cast<const std::uint16_t*>(array.data) + row * array.row + head * array.head;
}

template <class Data>
__device__ __forceinline__ Data* row_of(const HeadRows<Data>& array, std::int64_t row, int head) {
  return array.data + row * array.row + head * array.head;
}

struct RowAndHead {
  std::int64_t row;  // -1: past the last one
  int head;
};

// Starts loading K or V of a tile.
template <class Shape>
__device__ __forceinline__ void load_keys(unsigned char* to, const HeadRows<const void>& from,
                                          int columns, int panels, bool aligned,
                                          const KeyTiles& tile, int kv_head) {
  const std::uint16_t* row0 = row_of(from, tile.row(), kv_head);
  const auto stride = static_cast<std::uint32_t>(from.row);  // 32 bits to save registers
  const Span keys = tile.keys();
  const int first = keys.first - tile.base, last = keys.last - tile.base;
  if constexpr (Shape::kEven) {
    load_even_tile<kKeys, Shape::kThreads, Shape::kVPanels>(to, columns, row0, stride, first, last);
  } else {
    load_tile<kKeys, Shape::kThreads>(to, columns, panels, aligned, [&](int row) {
      return row >= first && row < last ? row0 + static_cast<std::uint32_t>(row) * stride : nullptr;
    });
  }
  commit_copies();
}

// Rows of a block. `Source` says where they are:
//   int position(int row)               of a row, also past the last one
//   const uint16_t* query(int row)      null past the last one
//   const float* scores(int row)        of row 0 of the keys; null past the last one (kFromScores)
template <class Shape, bool kFromScores, class Source>
struct Block {
  const AttendParams& params;
  const Source& source;
  const int kv_head;
  const Buffers<Shape> buffers{params};
  const Place<Shape> place{};

  __device__ __forceinline__ Block(const AttendParams& p, const Source& rows, int of_kv_head)
      : params(p), source(rows), kv_head(of_kv_head) {}

  __device__ __forceinline__ void load_k(const KeyTiles& tile) const {
    if constexpr (!kFromScores) {
      load_keys<Shape>(buffers.k, params.k, params.head_dim, panels_of(params.head_dim),
                       params.k_aligned, tile, kv_head);
    }
  }

  __device__ __forceinline__ void load_v(const KeyTiles& tile) const {
    load_keys<Shape>(buffers.v, params.v, params.v_head_dim, Shape::kVPanels, params.v_aligned,
                     tile, kv_head);
  }

  // What the warp's rows see of a tile: the first row least, the last most, or the other way round.
  __device__ __forceinline__ Span seen_by_any(Span keys) const {
    const Span first = visible(params, source.position(place.row0));
    const Span last = visible(params, source.position(place.row0 + Shape::kWarpRows - 1));
    return {max(keys.first, first.first), min(keys.last, last.last)};
  }

  __device__ __forceinline__ bool all_see(int base, Span keys) const {
    const Span first = visible(params, source.position(place.row0));
    const Span last = visible(params, source.position(place.row0 + Shape::kWarpRows - 1));
    return max(keys.first, last.first) <= base && min(keys.last, first.last) >= base + kKeys;
  }

  // Waits for the block. Returns whether its V, of `keys`, is not finite somewhere in a tile of
  // which some row does not see all: zero times such a value would be NaN.
  __device__ __forceinline__ bool meet_at_v(Span keys) const {
    const Span first = visible(params, source.position(0));
    const Span last = visible(params, source.position(Shape::kRows - 1));
    if (last.first <= keys.first && first.last >= keys.last) {
      __syncthreads();
      return false;
    }
    return __syncthreads_or(
        loaded_nonfinite<typename Shape::T, kKeys, Shape::kThreads, Shape::kVPanels>(buffers.v));
  }

  // Folds what is not finite of a tile's V into `state`, for the rows that see it, and puts zeros
  // in its place.
  __device__ __forceinline__ void multiply_nonfinite(WarpState<Shape>& state,
                                                     const Scores<Shape>& s, int base,
                                                     bool any) const {
    if (any) {
      const auto sees = [&](int row, int key) {
        const Span seen = visible(params, source.position(row));
        return base + key >= seen.first && base + key < seen.last;
      };
      cuda::multiply_nonfinite<Shape>(state, s, buffers.p, buffers.v, place, sees);
    }
    __syncthreads();
    clear_nonfinite<typename Shape::T, kKeys, Shape::kThreads, Shape::kVPanels>(buffers.v);
    __syncthreads();
  }

  __device__ __forceinline__ void read_scores(Scores<Shape>& s, const KeyTiles& tile) const {
    const Span keys = tile.keys();
#pragma unroll
    for (int m = 0; m < Shape::kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* row = source.scores(place.row(m, i / 2));
#pragma unroll
        for (int n = 0; n < Shape::kWarpKeys / 8; ++n) {
          const int offset = place.key0 + 8 * n + place.lane % 4 * 2 + i % 2;
          const int key = tile.base + offset;
          const bool inside = row && key >= keys.first && key < keys.last;
          s[m][n][i] = inside ? row[tile.row() + offset] : 0.0F;
        }
      }
    }
  }

  // Folds `tiles`, which stand at the first one, into `state`. Returns false at a tile that hides
  // from a row what is not finite of its V, unless kSelects: then such a row does not meet it. Two
  // instances, one of them out of line, so that the other has all registers for what calls are.
  template <bool kSelects>
  __device__ __forceinline__ bool fold(KeyTiles tiles, WarpState<Shape>& state) const {
    if constexpr (!kFromScores) {
      load_tile<Shape::kRows, Shape::kThreads>(buffers.q, params.head_dim,
                                               panels_of(params.head_dim), params.q_aligned,
                                               [&](int row) { return source.query(row); });
    }
    load_k(tiles);
    bool more = true;
    while (more) {
      wait_for_copies<0>();
      __syncthreads();  // K is there, and nobody reads V or P any more
      const KeyTiles tile = tiles;
      if (!has_one_buffer<Shape>(params)) load_v(tile);
      const Span keys = tile.keys(), seen = seen_by_any(keys);
      const bool any = seen.first < seen.last;
      Scores<Shape> s;
      if (any) {
        if constexpr (kFromScores) {
          read_scores(s, tile);
        } else {
          clear<Shape>(s);
          score<Shape>(s, buffers.q, buffers.k, panels_of(params.head_dim), place);
        }
      }
      if (has_one_buffer<Shape>(params)) {
        __syncthreads();
        load_v(tile);
      }
      more = tiles.next();
      wait_for_copies<0>();
      const bool masks_nonfinite = meet_at_v(keys);  // V is there, and nobody reads K any more
      if (!kSelects && masks_nonfinite) return false;
      if (more && !has_one_buffer<Shape>(params)) load_k(tiles);
      if (any) {
        const float unit = natural_unit<Shape>(s, params.scale, params.softcap);
        if (!all_see(tile.base, keys)) {
          mask<Shape>(s, params, tile.base, keys, place,
                      [&](int row) { return source.position(row); });
        }
        state.exponentials(s, unit, buffers.maxima, place);
        if constexpr (Shape::kColumnGroups > 1) state.share(s, buffers.p, place);
        if constexpr (!kSelects) state.multiply_values(s, buffers.p, buffers.v, place);
      }
      if constexpr (kSelects) {
        if (masks_nonfinite) multiply_nonfinite(state, s, tile.base, any);
        if (any) state.multiply_values(s, buffers.p, buffers.v, place);
      }
      if (more && has_one_buffer<Shape>(params)) {
        __syncthreads();
        load_k(tiles);
      }
    }
    return true;
  }
};

// Where a block's state lies in memory, and moving it. Neighbours are moved in pairs: four lanes
// fill the 32-byte sectors that memory is made of, so wider accesses would save no traffic.
template <class Shape>
struct StateRows {
  const HeadRows<float>&row_max, &row_sum, &out;
  int columns;
  bool pairs;  // pairs of `out` are aligned

  // Of a fresh row only the maximum and the sum are read.
  template <class At>
  __device__ __forceinline__ void read(WarpState<Shape>& state, const Place<Shape>& place,
                                       At&& at) const {
#pragma unroll
    for (int m = 0; m < Shape::kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto [row, head] = at(place.row(m, half));
        const float most = row < 0 ? -kInfinity : *row_of(row_max, row, head);
        const float sum = row < 0 ? 0.0F : *row_of(row_sum, row, head);
        const bool fresh = most == -kInfinity && sum == 0.0F;
        const float* from = fresh ? nullptr : row_of(out, row, head);
        state.row_max[m][half] = most;
        state.row_sum[m][2 * half] = state.row_sum[m][2 * half + 1] = sum;
#pragma unroll
        for (int n = 0; n < Shape::kWarpColumns / 8; ++n) {
          const int column = place.column0 + 8 * n + place.lane % 4 * 2;
          float2 pair = make_float2(0.0F, 0.0F);
          if (!fresh && pairs && column + 1 < columns) {
            pair = *reinterpret_cast<const float2*>(from + column);
          } else if (!fresh) {
            if (column < columns) pair.x = from[column];
            if (column + 1 < columns) pair.y = from[column + 1];
          }
          state.out[m][n][2 * half] = pair.x;
          state.out[m][n][2 * half + 1] = pair.y;
        }
      }
    }
  }

  template <class At>
  __device__ __forceinline__ void write(const WarpState<Shape>& state, const Place<Shape>& place,
                                        bool writes_sums, At&& at) const {
#pragma unroll
    for (int m = 0; m < Shape::kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto [row, head] = at(place.row(m, half));
        if (row < 0) continue;
        if (writes_sums && place.column_group == 0 && place.lane % 4 == 0) {
          *row_of(row_max, row, head) = state.row_max[m][half];
          *row_of(row_sum, row, head) = state.row_sum[m][2 * half];
        }
        float* to = row_of(out, row, head);
#pragma unroll
        for (int n = 0; n < Shape::kWarpColumns / 8; ++n) {
          const int column = place.column0 + 8 * n + place.lane % 4 * 2;
          const float x = state.out[m][n][2 * half], y = state.out[m][n][2 * half + 1];
          if (pairs && column + 1 < columns) {
            *reinterpret_cast<float2*>(to + column) = make_float2(x, y);
          } else {
            if (column < columns) to[column] = x;
            if (column + 1 < columns) to[column + 1] = y;
          }
        }
      }
    }
  }
};

}  // namespace pympa::cuda
