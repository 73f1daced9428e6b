// Rotary embedding (Su et al., 2021) of x [rows, heads, head_dim], of pairs (a, b) of dimensions
// (i, i + half), or interleaved (2i, 2i + 1):
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

template <bool kWhole, int kCount, class T>
__device__ __forceinline__ void load_pairs(const T* from, std::int64_t left, float (&a)[kCount],
                                           float (&b)[kCount]) {
  float x[2 * kCount];
  load<kWhole>(from, 2 * left, x);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    a[i] = x[2 * i];
    b[i] = x[2 * i + 1];
  }
}

template <bool kWhole, int kCount, class T>
__device__ __forceinline__ void store_pairs(T* to, std::int64_t left, const float (&a)[kCount],
                                            const float (&b)[kCount]) {
  float x[2 * kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[2 * i] = a[i];
    x[2 * i + 1] = b[i];
  }
  store<kWhole>(to, 2 * left, x);
}

// Rotates the pairs of x, a head of a row, from `pair` on.
template <bool kInterleaved, bool kWhole, class T>
__device__ __forceinline__ void rotate(const Rope<T>& args, T* x, std::int64_t table,
                                       std::int64_t pair, std::int64_t left) {
  constexpr int kCount = kGroup<T>;
  float a[kCount], b[kCount], c[kCount], s[kCount];
  if constexpr (kInterleaved) {
    load_pairs<kWhole>(x + 2 * pair, left, a, b);
  } else {
    load<kWhole>(x + pair, left, a);
    load<kWhole>(x + args.half + pair, left, b);
  }
  load<kWhole>(args.cos(table, pair), left, c);
  load<kWhole>(args.sin(table, pair), left, s);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float old_a = a[i], old_b = b[i];
    a[i] = fmaf(old_a, c[i], -(old_b * s[i]));
    b[i] = fmaf(old_b, c[i], old_a * s[i]);
  }
  if constexpr (kInterleaved) {
    store_pairs<kWhole>(x + 2 * pair, left, a, b);
  } else {
    store<kWhole>(x + pair, left, a);
    store<kWhole>(x + args.half + pair, left, b);
  }
}

template <class T, bool kInterleaved>
__global__ void rope_kernel(Rope<T> args) {
  for_each_group<kGroup<T>>(
      args.rows * args.heads, args.half, args.aligned,
      [&]<bool kWhole>(std::int64_t item, std::int64_t pair, std::int64_t left) {
        const std::int64_t row = item / args.heads, head = item % args.heads;
        T* x = args.x + row * args.row_stride + head * args.head_stride;
        rotate<kInterleaved, kWhole>(args, x, args.index[row], pair, left);
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
    const auto kernel = args.interleaved ? rope_kernel<T, true> : rope_kernel<T, false>;
    launch(kernel, grid, block, 0, args.on.stream, rope);
  });
}

}  // namespace

const RopeKernels rope_kernels = {rope_cuda};

}  // namespace pympa::cuda
