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
  const std::int64_t chunks = (args.heads + kHeads - 1) / kHeads;
  for_each_group<kCount>(
      args.rows * chunks, args.half, args.aligned,
      [&]<bool kWhole>(std::int64_t item, std::int64_t pair, std::int64_t left) {
        const std::int64_t row = item / chunks, first = item % chunks * kHeads;
        T* x = args.x + row * args.row_stride + first * args.head_stride + pair;
        const int heads =
            args.heads - first < kHeads ? static_cast<int>(args.heads - first) : kHeads;
        const std::int64_t table = args.index[row];
        Group<T> a[kHeads], b[kHeads];
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          if (h < heads) a[h] = read<kWhole>(x + h * args.head_stride, left);
          if (h < heads) b[h] = read<kWhole>(x + h * args.head_stride + args.half, left);
        }
        float c[kCount], s[kCount];
        load<kWhole>(args.cos(table, pair), left, c);
        load<kWhole>(args.sin(table, pair), left, s);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          if (h >= heads) continue;
          float turned_a[kCount], turned_b[kCount];
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const float old_a = to_float(a[h].at[i]), old_b = to_float(b[h].at[i]);
            turned_a[i] = fmaf(old_a, c[i], -(old_b * s[i]));
            turned_b[i] = fmaf(old_b, c[i], old_a * s[i]);
          }
          store<kWhole>(x + h * args.head_stride, left, turned_a);
          store<kWhole>(x + h * args.head_stride + args.half, left, turned_b);
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
