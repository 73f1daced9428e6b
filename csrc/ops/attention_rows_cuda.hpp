// Attention of many rows on a GPU: a block folds the keys that a tile of one head's rows sees. Each
// element type has its own file, so that several cores can compile them at once.
//
//   v_head_dim   rows x keys   warps: rows x columns
//   up to 64     128 x 64      4 x 1    a warp has 32 rows: K and V are read from shared memory
//   up to 128    128 x 64      4 x 1    once for two products
//   up to 256     64 x 64      2 x 2    128 columns of 32 rows fill the registers
//   up to 512     64 x 64      2 x 4

#pragma once

#include "ops/attention_launch_cuda.hpp"

namespace pympa::cuda {

// Consecutive rows of one head.
struct HeadSource {
  const AttendParams& params;
  std::int64_t row0;
  int rows, start, head;

  __device__ __forceinline__ int position(int row) const { return start + row; }
  __device__ __forceinline__ RowAndHead at(int row) const {
    return {row < rows ? row0 + row : -1, head};
  }
  __device__ __forceinline__ const std::uint16_t* query(int row) const {
    return row < rows ? row_of(params.q, row0 + row, head) : nullptr;
  }
  __device__ __forceinline__ const float* scores(int row) const {
    return row < rows ? row_of(params.scores, row0 + row, head) : nullptr;
  }
};

template <class Shape>
__host__ __device__ int tiles_of(const Range& range) {
  return (range.length + Shape::kRows - 1) / Shape::kRows;
}

// What a block is for: rows from `first` on of a range, for one head of the launch.
struct Tile {
  int range, first, head;
};

// Block (tile, head), heads running fastest; the last tiles of a range see most keys under a causal
// mask, so they come first.
template <class Shape>
__device__ __forceinline__ Tile tile_of_block(const AttendParams& params) {
  int tile = static_cast<int>(blockIdx.x) / params.heads, range = 0;
  for (; tile >= tiles_of<Shape>(params.q_ranges[range]); ++range) {
    tile -= tiles_of<Shape>(params.q_ranges[range]);
  }
  const int first = (tiles_of<Shape>(params.q_ranges[range]) - 1 - tile) * Shape::kRows;
  return {range, first, static_cast<int>(blockIdx.x) % params.heads};
}

// Returns false, with nothing written, where Block::fold does.
template <class Shape, bool kFromScores, bool kSelects>
__device__ __forceinline__ bool attend_tile(const AttendParams& params, const Tile& tile) {
  const auto [range, first, index] = tile;
  const Range& queries = params.q_ranges[range];
  const HeadSource source{params, std::int64_t{queries.row} + first,
                          min(queries.length - first, Shape::kRows), queries.start + first,
                          params.head[index]};
  KeyTiles tiles(params, queries.sequence, {source.start, source.start + source.rows});
  if (!tiles.next()) return true;
  const Block<Shape, kFromScores, HeadSource> block(params, source, params.kv_head[index]);
  const StateRows<Shape> rows{params.row_max, params.row_sum, params.out, params.v_head_dim,
                              params.out_pairs_aligned};
  const auto at = [&](int row) { return source.at(row); };
  WarpState<Shape> state;
  rows.read(state, block.place, at);
  if (!block.template fold<kSelects>(tiles, state)) return false;
  rows.write(state, block.place, params.writes_sums, at);
  return true;
}

// The same warps with 16 rows each, which leaves room in registers; even or not is one shape, as
// compiling this way twice would take as long as the other one.
template <class Shape>
using Slim =
    AttendShape<typename Shape::T, Shape::kVPanels, 1, Shape::kRowGroups, Shape::kColumnGroups>;

// kRows rows of a block once more, whatever V holds.
template <class Shape, int kRows, bool kFromScores>
PYMPA_OUT_OF_LINE void attend_nonfinite(const AttendParams& params, Tile tile) {
  const int last = min(tile.first + kRows, params.q_ranges[tile.range].length);
  for (; tile.first < last; tile.first += Shape::kRows) {
    attend_tile<Shape, kFromScores, true>(params, tile);
    __syncthreads();  // nobody reads shared memory any more
  }
}

template <class Shape, bool kFromScores>
__global__ void __launch_bounds__(Shape::kThreads)
    attend_kernel(const __grid_constant__ AttendParams params) {
  const Tile tile = tile_of_block<Shape>(params);
  if (!attend_tile<Shape, kFromScores, false>(params, tile)) {
    attend_nonfinite<Slim<Shape>, Shape::kRows, kFromScores>(params, tile);
  }
}

template <class Shape, bool kFromScores>
void launch_shape(const AttendParams& params, int bytes, void* stream) {
  std::int64_t tiles = 0;
  for (int i = 0; i < params.q_range_count; ++i) tiles += tiles_of<Shape>(params.q_ranges[i]);
  launch(attend_kernel<Shape, kFromScores>, dim3{static_cast<unsigned>(tiles * params.heads)},
         dim3{Shape::kThreads}, static_cast<std::size_t>(bytes), stream, params);
}

template <class T, int kVPanels, int kRowGroups, int kColumnGroups>
void launch_rows(AttendParams& params, void* stream) {
  using Shape = AttendShape<T, kVPanels, 2, kRowGroups, kColumnGroups>;
  using Even = AttendShape<T, kVPanels, 2, kRowGroups, kColumnGroups, true>;
  const int bytes = fit_shared<Shape>(params);
  if (is_even<Shape>(params)) {
    launch_shape<Even, false>(params, bytes, stream);
  } else {
    launch_shape<Shape, false>(params, bytes, stream);
  }
}

template <class T>
void attend_rows(const AttendArgs& args) {
  for_each_launch(args, [&](AttendParams& params) {
    // Wide queries leave room for 64 rows only.
    const int columns = std::max(params.v_head_dim, params.head_dim > 256 ? 256 : 0);
    if (columns <= 64) {
      launch_rows<T, 1, 4, 1>(params, args.on.stream);
    } else if (columns <= 128) {
      launch_rows<T, 2, 4, 1>(params, args.on.stream);
    } else if (columns <= 256) {
      launch_rows<T, 4, 2, 2>(params, args.on.stream);
    } else {
      launch_rows<T, 8, 2, 4>(params, args.on.stream);
    }
  });
}

// 64 columns of V after 64 columns, so that one shape is enough.
template <class T>
void fold_scores(const AttendArgs& args) {
  for_each_launch(args, [&](AttendParams& params) {
    const int columns = params.v_head_dim;
    for (int column = 0; column < columns; column += kPanel) {
      params.v_head_dim = std::min(columns - column, kPanel);
      params.writes_sums = column + kPanel >= columns;
      using Shape = AttendShape<T, 1, 2, 4, 1>;
      launch_shape<Shape, true>(params, fit_shared<Shape>(params), args.on.stream);
      params.v.data = static_cast<const std::uint16_t*>(params.v.data) + kPanel;
      params.out.data += kPanel;
    }
  });
}

}  // namespace pympa::cuda
