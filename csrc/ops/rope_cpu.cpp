// Rotary embedding (Su et al., 2021) of x [rows, heads, head_dim], half-split pairs (i, i + half):
//
//   a' = a cos - b sin ; b' = b cos + a sin        cos, sin [tables, half], one table row a token

#include "cpu/convert.hpp"
#include "cpu/parallel.hpp"
#include "ops/rope.hpp"

namespace pympa::PYMPA_ISA {

namespace {

template <class T>
void rope_rows(const RopeArgs& args, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* cos = args.cos + args.index[row] * args.cos_stride;
    const float* sin = args.sin + args.index[row] * args.sin_stride;
    for (int64_t head = 0; head < args.heads; ++head) {
      T* a = static_cast<T*>(args.x) + row * args.x_row + head * args.x_head;
      T* b = a + args.half;
      for (int64_t i = 0; i < args.half; i += W) {
        const int64_t count = args.half - i;
        const V c = load(cos + i, count), s = load(sin + i, count);
        const V x = load(a + i, count), y = load(b + i, count);
        store(a + i, fma(x, c, -(y * s)), count);
        store(b + i, fma(y, c, x * s), count);
      }
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
