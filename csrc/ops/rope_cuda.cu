// Rotary embedding (Su et al., 2021) of x [rows, heads, head_dim], half-split pairs (i, i + half):
//
//   a' = a cos - b sin ; b' = b cos + a sin        cos, sin [tables, half], one table row a token
//
// A thread rotates one group of pairs of one head. Heads of a row are neighbours in a block, so its
// cos and sin are read from memory once, and from the cache for the other heads.

#include "cuda/rows.hpp"
#include "ops/rope.hpp"

namespace pympa::cuda {

namespace {

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
  for_each_group<kCount>(args.rows * args.heads, args.half, args.aligned,
                         [&]<bool kWhole>(std::int64_t item, std::int64_t pair, std::int64_t left) {
                           const std::int64_t row = item / args.heads, head = item % args.heads;
                           T* at_a =
                               args.x + row * args.row_stride + head * args.head_stride + pair;
                           T* at_b = at_a + args.half;
                           const std::int64_t table = args.index[row];
                           float a[kCount], b[kCount], c[kCount], s[kCount];
                           load<kWhole>(at_a, left, a);
                           load<kWhole>(at_b, left, b);
                           load<kWhole>(args.cos(table, pair), left, c);
                           load<kWhole>(args.sin(table, pair), left, s);
#pragma unroll
                           for (int i = 0; i < kCount; ++i) {
                             const float old_a = a[i], old_b = b[i];
                             a[i] = fmaf(old_a, c[i], -(old_b * s[i]));
                             b[i] = fmaf(old_b, c[i], old_a * s[i]);
                           }
                           store<kWhole>(at_a, left, a);
                           store<kWhole>(at_b, left, b);
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
    const auto [grid, block] = row_grid(args.rows * args.heads, ceil_div(args.half, kGroup<T>));
    launch(rope_kernel<T>, grid, block, 0, args.on.stream, rope);
  });
}

}  // namespace

const RopeKernels rope_kernels = {rope_cuda};

}  // namespace pympa::cuda
