// Rotary embedding (Su et al., 2021) of x [rows, heads, head_dim], half-split pairs (i, i + half):
//
//   a' = a cos - b sin ; b' = b cos + a sin        cos, sin [tables, half], one table row a token
//
// A thread turns one group of pairs in four heads of a row, so that it reads its cos and sin once
// for four and has eight groups of x on their way together.

#include "cuda/rows.hpp"
#include "ops/rope.hpp"

namespace pympa::cuda {

namespace {

constexpr int kHeads = 4;  // of one thread; rows of few tokens still make threads enough

template <class T>
struct Rope {
  T* x;
  std::int64_t row_stride, head_stride;
  Rows<const float> cos, sin;
  const std::int32_t* index;
  std::int64_t rows, heads, half;
  bool aligned;
};

template <class T>
__global__ void rope_kernel(Rope<T> args) {
  constexpr int kCount = kGroup<T>;
  const std::int64_t groups = (args.half + kCount - 1) / kCount;
  const std::int64_t chunks = (args.heads + kHeads - 1) / kHeads;
  for_each_group(args.rows * chunks, groups, [&](std::int64_t item, std::int64_t group) {
    const std::int64_t row = item / chunks, head = item % chunks * kHeads;
    const std::int64_t pair = group * kCount, left = args.half - pair;
    const std::int64_t table = args.index[row];
    float c[kCount], s[kCount], a[kHeads][kCount], b[kHeads][kCount];
    load(args.cos(table, pair), left, args.aligned, c);
    load(args.sin(table, pair), left, args.aligned, s);
    T* x = args.x + row * args.row_stride + head * args.head_stride + pair;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (head + h >= args.heads) continue;
      load(x + h * args.head_stride, left, args.aligned, a[h]);
      load(x + h * args.head_stride + args.half, left, args.aligned, b[h]);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (head + h >= args.heads) continue;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float old_a = a[h][i], old_b = b[h][i];
        a[h][i] = fmaf(old_a, c[i], -(old_b * s[i]));
        b[h][i] = fmaf(old_b, c[i], old_a * s[i]);
      }
      store(x + h * args.head_stride, left, args.aligned, a[h]);
      store(x + h * args.head_stride + args.half, left, args.aligned, b[h]);
    }
  });
}

void rope_cuda(const RopeArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    Rope<T> rope{static_cast<T*>(args.x),
                 args.x_row,
                 args.x_head,
                 {args.cos, args.cos_stride},
                 {args.sin, args.sin_stride},
                 args.index,
                 args.rows,
                 args.heads,
                 args.half,
                 false};
    rope.aligned =
        is_aligned(Rows<T>{rope.x, args.x_row}) && is_aligned(Rows<T>{rope.x, args.x_head}) &&
        is_aligned(Rows<T>{rope.x, args.half}) && is_aligned(rope.cos) && is_aligned(rope.sin);
    const auto [grid, block] =
        row_grid(args.rows * ceil_div(args.heads, kHeads), ceil_div(args.half, kGroup<T>));
    launch(rope_kernel<T>, grid, block, 0, args.on.stream, rope);
  });
}

}  // namespace

const RopeKernels rope_kernels = {rope_cuda};

}  // namespace pympa::cuda
