// Attention of few rows and many keys on a GPU: keys are split at fixed positions, so that all
// multiprocessors read them from memory (Flash-Decoding, Dao et al., 2023).
//
// A block has the query rows of all heads that share a K/V head, packed into 16 rows, and one split
// of 512 positions; four warps share the rows. Partial states are written to the workspace; a
// second kernel folds them into the carried state in ascending order. Splits are key tiles of the
// call's ranges, so neither cuts of the keys at multiples of 512 nor other rows or sequences change
// a bit.

#include <limits>

#include "core/check.hpp"
#include "ops/attention_launch_cuda.hpp"

namespace pympa::cuda {

namespace {

constexpr int kSplit = static_cast<int>(kKeyTile);
constexpr std::int64_t kMostTiles = 65535;  // the third axis of a grid
constexpr int kFoldRows = 4;                // (row, head) pairs of a block that folds: a warp each

// What a launch needs besides AttendParams. Items are the (key range, split) pairs that a query
// range sees; its partial rows are [items][rows of the range][heads of the launch].
struct DecodeParams {
  int groups;                                 // K/V heads that have query heads
  std::uint16_t group_first[kMostHeads + 1];  // of each in AttendParams::head
  int first_item[kMostRanges + 1];
  int first_row[kMostRanges + 1];      // of query rows, packed in the order of the launch
  int first_partial[kMostRanges + 1];  // [items][rows] before those of a range
  HeadRows<float> row_max, row_sum, out;
};
static_assert(sizeof(AttendParams) + sizeof(DecodeParams) <= 4096);

__host__ __device__ inline Span splits_of(const AttendParams& params, const Range& keys,
                                          const Range& queries) {
  if (keys.sequence != queries.sequence) return {0, 0};
  const Span seen = seen_of(params, keys, {queries.start, queries.start + queries.length});
  if (seen.last <= seen.first) return {0, 0};
  return {seen.first / kSplit, (seen.last - 1) / kSplit + 1};
}

__device__ __forceinline__ int find(const int* firsts, int index) {
  int at = 0;
  while (index >= firsts[at + 1]) ++at;
  return at;
}

// Rows [first, rows) of the query rows of a range, those of one position side by side.
struct PackedSource {
  const AttendParams& params;
  const Range& queries;
  const std::uint16_t* heads;  // those of the group
  int group, first, rows;
  std::int64_t partial;  // of row 0 of the range, head 0 of the group
  int partial_heads;

  __device__ __forceinline__ int position(int row) const {
    return queries.start + min(first + row, rows - 1) / group;
  }
  __device__ __forceinline__ RowAndHead at(int row) const {
    const int packed = first + row;
    return {packed < rows ? partial + std::int64_t{packed / group} * partial_heads + packed % group
                          : -1,
            0};
  }
  __device__ __forceinline__ const std::uint16_t* query(int row) const {
    const int packed = first + row;
    return packed < rows
               ? row_of(params.q, std::int64_t{queries.row} + packed / group, heads[packed % group])
               : nullptr;
  }
};

// Block (item, group, 16 packed rows). Returns false, with nothing written, where Block::fold does.
template <class Shape, bool kSelects>
__device__ __forceinline__ bool decode_block(const AttendParams& params,
                                             const DecodeParams& decode) {
  const int index = find(decode.first_item, static_cast<int>(blockIdx.x));
  const Range& queries = params.q_ranges[index];
  const int item = static_cast<int>(blockIdx.x) - decode.first_item[index];
  const int head0 = decode.group_first[blockIdx.y];
  const int group = decode.group_first[blockIdx.y + 1] - head0;
  const std::int64_t partial =
      (decode.first_partial[index] + std::int64_t{item} * queries.length) * params.heads + head0;
  const PackedSource source{params,
                            queries,
                            params.head + head0,
                            group,
                            static_cast<int>(blockIdx.z) * Shape::kRows,
                            queries.length * group,
                            partial,
                            params.heads};
  if (source.first >= source.rows) return true;
  KeyTiles tiles(params, queries.sequence,
                 {source.position(0), source.position(Shape::kRows - 1) + 1});
  int range = 0, before = item;  // items of the range at hand before this one
  Span splits = splits_of(params, params.k_ranges[0], queries);
  while (before >= splits.last - splits.first) {
    before -= splits.last - splits.first;
    splits = splits_of(params, params.k_ranges[++range], queries);
  }
  const int split = splits.first + before;
  tiles.range = range - 1;
  tiles.range_count = range + 1;
  tiles.within = {split * kSplit, (split + 1) * kSplit};
  const Block<Shape, false, PackedSource> block(params, source, params.kv_head[head0]);
  const StateRows<Shape> rows{decode.row_max, decode.row_sum, decode.out, params.v_head_dim, true};
  WarpState<Shape> state;
  state.start();
  if (tiles.next() && !block.template fold<kSelects>(tiles, state)) return false;
  rows.write(state, block.place, true, [&](int row) { return source.at(row); });
  return true;
}

// The block once more, whatever V holds.
template <class Shape>
PYMPA_OUT_OF_LINE void decode_nonfinite(const AttendParams& params, const DecodeParams& decode) {
  decode_block<Shape, true>(params, decode);
}

// Blocks that a multiprocessor holds by their registers: keys on their way hide memory's latency,
// so what is out of line takes none of them.
template <class Shape>
constexpr int kBlocks = Shape::kVPanels == 1  ? 5
                        : Shape::kVPanels < 8 ? 4
                                              : 3;

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, kBlocks<Shape>)
    decode_kernel(const __grid_constant__ AttendParams params,
                  const __grid_constant__ DecodeParams decode) {
  if (!decode_block<Shape, false>(params, decode)) decode_nonfinite<Shape>(params, decode);
}

// Folds the partial states of a (row, head) pair into the carried one, by ascending item.
__global__ void __launch_bounds__(kWarp* kFoldRows)
    fold_splits_kernel(const __grid_constant__ AttendParams params,
                       const __grid_constant__ DecodeParams decode) {
  const int slot = static_cast<int>(blockIdx.y * kFoldRows + threadIdx.x / kWarp);
  if (slot >= params.heads) return;
  const int index = find(decode.first_row, static_cast<int>(blockIdx.x));
  const int local = static_cast<int>(blockIdx.x) - decode.first_row[index];
  const Range& queries = params.q_ranges[index];
  const int items = decode.first_item[index + 1] - decode.first_item[index];
  const std::int64_t row = std::int64_t{queries.row} + local;
  const int head = params.head[slot], lane = static_cast<int>(threadIdx.x) % kWarp;
  float* carried = row_of(params.out, row, head);
  const float row_max = *row_of(params.row_max, row, head);
  const float row_sum = *row_of(params.row_sum, row, head);
  const bool fresh = row_max == -kInfinity && row_sum == 0.0F;
  float most = row_max, sum = row_sum;
  for (int column = 4 * lane; column - 4 * lane < params.v_head_dim; column += 4 * kWarp) {
    float4 out = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    float* const at[4] = {&out.x, &out.y, &out.z, &out.w};
    const int columns = min(params.v_head_dim - column, 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!fresh && i < columns) *at[i] = carried[column + i];
    }
    most = row_max;
    sum = row_sum;
    for (int item = 0; item < items; ++item) {
      const std::int64_t partial =
          (decode.first_partial[index] + std::int64_t{item} * queries.length + local) *
              params.heads +
          slot;
      const float other_max = decode.row_max.data[partial],
                  other_sum = decode.row_sum.data[partial];
      if (other_max == -kInfinity && other_sum == 0.0F) continue;
      const float now = fmaxf(most, other_max);
      const float a = now == most ? 1.0F : exp2_approximate((most - now) * kLog2E);
      const float b = now == other_max ? 1.0F : exp2_approximate((other_max - now) * kLog2E);
      most = now;
      sum = fmaf(other_sum, b, sum * a);
      if (columns <= 0) continue;
      const float4 x = *reinterpret_cast<const float4*>(row_of(decode.out, partial, 0) + column);
      out = make_float4(fmaf(x.x, b, out.x * a), fmaf(x.y, b, out.y * a), fmaf(x.z, b, out.z * a),
                        fmaf(x.w, b, out.w * a));
    }
    const bool seen = most != -kInfinity || sum != 0.0F;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (seen && i < columns) carried[column + i] = *at[i];
    }
  }
  __syncwarp();  // all lanes have read what lane 0 writes
  if (lane == 0) {
    *row_of(params.row_max, row, head) = most;
    *row_of(params.row_sum, row, head) = sum;
  }
}

std::int64_t round_up(std::int64_t count, std::int64_t to) { return (count + to - 1) / to * to; }

void check_at_most(const std::string& what, std::int64_t count, std::int64_t most) {
  if (count <= most) return;
  fail("attend", "q_ranges", "rows for at most " + std::to_string(most) + " " + what,
       std::to_string(count));
}

// Where items, rows and partial states of a launch lie; returns the bytes of the latter.
std::int64_t plan(const AttendParams& params, void* workspace, DecodeParams& decode) {
  decode.groups = 0;
  for (int i = 0; i < params.heads; ++i) {
    if (i > 0 && params.kv_head[i] == params.kv_head[i - 1]) continue;
    decode.group_first[decode.groups++] = static_cast<std::uint16_t>(i);
  }
  decode.group_first[decode.groups] = static_cast<std::uint16_t>(params.heads);
  decode.first_item[0] = decode.first_row[0] = decode.first_partial[0] = 0;
  for (int i = 0; i < params.q_range_count; ++i) {
    const Range& queries = params.q_ranges[i];
    int items = 0;
    for (int k = 0; k < params.k_range_count; ++k) {
      const Span splits = splits_of(params, params.k_ranges[k], queries);
      items += splits.last - splits.first;
    }
    decode.first_item[i + 1] = decode.first_item[i] + items;
    decode.first_row[i + 1] = decode.first_row[i] + queries.length;
    const std::int64_t partials = decode.first_partial[i] + std::int64_t{items} * queries.length;
    check_at_most("partial states where decode is set", partials, std::numeric_limits<int>::max());
    decode.first_partial[i + 1] = static_cast<int>(partials);
  }
  const std::int64_t rows = std::int64_t{decode.first_partial[params.q_range_count]} * params.heads;
  const std::int64_t columns = round_up(params.v_head_dim, 4), sums = round_up(rows, 4);
  const auto base = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(workspace));
  float* memory = static_cast<float*>(workspace) + (round_up(base, 16) - base) / 4;
  decode.row_max = {memory, 1, 0};
  decode.row_sum = {memory + sums, 1, 0};
  decode.out = {memory + 2 * sums, columns, 0};
  return (2 * sums + rows * columns) * 4 + 16;
}

template <class T, int kVPanels>
void launch_decode(AttendParams& params, const DecodeParams& decode, void* stream) {
  using Shape = AttendShape<T, kVPanels, 1, 1, 4>;
  int most_rows = 0;
  for (int i = 0; i < params.q_range_count; ++i) {
    most_rows = std::max(most_rows, params.q_ranges[i].length);
  }
  int most_heads = 0;
  for (int i = 0; i < decode.groups; ++i) {
    most_heads = std::max(most_heads, decode.group_first[i + 1] - decode.group_first[i]);
  }
  const auto items = static_cast<unsigned>(decode.first_item[params.q_range_count]);
  const std::int64_t packed = std::int64_t{most_rows} * most_heads;
  check_at_most("pairs of a row and a head of one K/V head where decode is set", packed,
                kMostTiles * Shape::kRows);
  const auto tiles = static_cast<unsigned>((packed + Shape::kRows - 1) / Shape::kRows);
  const int bytes = fit_shared<Shape>(params);
  launch(decode_kernel<Shape>, dim3{items, static_cast<unsigned>(decode.groups), tiles},
         dim3{Shape::kThreads}, static_cast<std::size_t>(bytes), stream, params, decode);
  const dim3 grid{static_cast<unsigned>(decode.first_row[params.q_range_count]),
                  static_cast<unsigned>((params.heads + kFoldRows - 1) / kFoldRows)};
  launch(fold_splits_kernel, grid, dim3{kWarp * kFoldRows}, 0, stream, params, decode);
}

}  // namespace

void attend_decode(const AttendArgs& args) {
  with_16_bits(args.dtype, [&]<class T>() {
    for_each_launch(args, [&](AttendParams& params) {
      DecodeParams decode{};
      plan(params, args.workspace, decode);
      if (decode.first_item[params.q_range_count] == 0) return;
      if (params.v_head_dim <= 64) {
        launch_decode<T, 1>(params, decode, args.on.stream);
      } else if (params.v_head_dim <= 128) {
        launch_decode<T, 2>(params, decode, args.on.stream);
      } else if (params.v_head_dim <= 256) {
        launch_decode<T, 4>(params, decode, args.on.stream);
      } else {
        launch_decode<T, 8>(params, decode, args.on.stream);
      }
    });
  });
}

std::int64_t decode_workspace_bytes(const AttendArgs& args) {
  std::int64_t most = 0;
  for_each_launch(args, [&](AttendParams& params) {
    DecodeParams decode{};
    most = std::max(most, plan(params, nullptr, decode));
  });
  return most;
}

}  // namespace pympa::cuda
