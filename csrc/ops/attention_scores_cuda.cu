// The first half of attention: scores of one key tile [rows, heads, keys], float32, neither scaled
// nor masked.
//
// head_dim is processed in panels of 64 columns, so it may have any size; the products of 16
// columns are added in the order of `attend_kernel`.

#include "ops/attention_launch_cuda.hpp"

namespace pympa::cuda {

namespace {

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    score_kernel(const __grid_constant__ AttendParams params, const HeadRows<float> scores) {
  const Range &queries = params.q_ranges[0], &keys = params.k_ranges[0];
  const int index = static_cast<int>(blockIdx.z);
  const int head = params.head[index], kv_head = params.kv_head[index];
  const int row0 = static_cast<int>(blockIdx.x) * Shape::kRows;
  const int key0 = static_cast<int>(blockIdx.y) * kKeys;
  const Place<Shape> place;
  unsigned char* q = dynamic_shared();
  unsigned char* k = q + Shape::kRows * kRowBytes;
  Scores<Shape> s;
  clear<Shape>(s);
  for (int column = 0; column < params.head_dim; column += kPanel) {
    const int columns = params.head_dim - column;
    load_tile<Shape::kRows, Shape::kThreads>(q, columns, 1, params.q_aligned, [&](int row) {
      return row0 + row < queries.length ? row_of(params.q, row0 + row, head) + column : nullptr;
    });
    load_tile<kKeys, Shape::kThreads>(k, columns, 1, params.k_aligned, [&](int row) {
      return key0 + row < keys.length ? row_of(params.k, key0 + row, kv_head) + column : nullptr;
    });
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    score<Shape>(s, q, k, 1, place);
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < Shape::kWarpKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + place.row(0, i / 2), key = key0 + 8 * n + place.lane % 4 * 2 + i % 2;
      if (row < queries.length && key < keys.length) {
        row_of(scores, row, head)[key] = s[0][n][i];
      }
    }
  }
}

unsigned groups_of(int count, int size) { return static_cast<unsigned>((count + size - 1) / size); }

}  // namespace

void make_scores(const AttendArgs& args) {
  with_16_bits(args.dtype, [&]<class T>() {
    using Shape = AttendShape<T, 1, 1, 4, 1>;
    for_each_launch(args, [&](AttendParams& params) {
      const dim3 grid{groups_of(params.q_ranges[0].length, Shape::kRows),
                      groups_of(params.k_ranges[0].length, kKeys),
                      static_cast<unsigned>(params.heads)};
      launch(score_kernel<Shape>, grid, dim3{Shape::kThreads},
             std::size_t{(Shape::kRows + kKeys) * kRowBytes}, args.on.stream, params, args.scores);
    });
  });
}

}  // namespace pympa::cuda
