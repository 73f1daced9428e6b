// Rotary embedding (Su et al., 2021) of x [rows, heads, head_dim], of pairs (a, b) of dimensions
// (i, i + half), or interleaved (2i, 2i + 1):
//
//   a' = a cos - b sin ; b' = b cos + a sin        cos, sin [tables, half], one table row a token

#include "cpu/convert.hpp"
#include "cpu/parallel.hpp"
#include "ops/rope.hpp"

namespace pympa::PYMPA_ISA {

namespace {

struct Pairs {
  V a, b;
};

PYMPA_INLINE Pairs rotate(Pairs x, V cos, V sin) {
  return {fma(x.a, cos, -(x.b * sin)), fma(x.b, cos, x.a * sin)};
}

template <class T>
void rotate_halves(T* a, const float* cos, const float* sin, int64_t half) {
  T* b = a + half;
  for (int64_t i = 0; i < half; i += W) {
    const int64_t count = half - i;
    const Pairs y = rotate({load(a + i, count), load(b + i, count)}, load(cos + i, count),
                           load(sin + i, count));
    store(a + i, y.a, count);
    store(b + i, y.b, count);
  }
}

// 2W neighbours as W pairs, and back.
PYMPA_INLINE Pairs parted(V first, V second) {
  const VInt even = 2 * lane_index();
  return {__builtin_shuffle(first, second, even), __builtin_shuffle(first, second, even + 1)};
}
PYMPA_INLINE Pairs joined(Pairs x) {
  const VInt pair = lane_index() / 2 + (lane_index() & 1) * W;
  return {__builtin_shuffle(x.a, x.b, pair), __builtin_shuffle(x.a, x.b, pair + W / 2)};
}

template <class T>
void rotate_neighbours(T* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += W, x += 2 * W) {
    const int64_t count = half - i, second = 2 * count - W;  // past the first vector
    const Pairs pairs = parted(load(x, 2 * count), second > 0 ? load(x + W, second) : V{});
    const Pairs y = joined(rotate(pairs, load(cos + i, count), load(sin + i, count)));
    store(x, y.a, 2 * count);
    if (second > 0) store(x + W, y.b, second);
  }
}

template <class T>
void rope_rows(const RopeArgs& args, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* cos = args.cos + args.index[row] * args.cos_stride;
    const float* sin = args.sin + args.index[row] * args.sin_stride;
    for (int64_t head = 0; head < args.heads; ++head) {
      T* x = static_cast<T*>(args.x) + row * args.x_row + head * args.x_head;
      args.interleaved ? rotate_neighbours(x, cos, sin, args.half)
                       : rotate_halves(x, cos, sin, args.half);
    }
  }
}

void rope_cpu(const RopeArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    for_row_pieces(args.on.threads, args.rows,
                   [&](int64_t first, int64_t last) { rope_rows<T>(args, first, last); });
  });
}

}  // namespace

const RopeKernels rope_kernels = {rope_cpu};

}  // namespace pympa::PYMPA_ISA
