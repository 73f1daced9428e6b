// Mixture of experts: the weighted sum of what experts return
//
//   out [rows, columns] = round(x[inverse 0] * weight 0 + x[inverse 1] * weight 1 + ... + base)
//
// where base is times sigmoid(gate [rows, 1]) if there is one.

#include "cpu/convert.hpp"
#include "cpu/math.hpp"
#include "cpu/parallel.hpp"
#include "ops/experts.hpp"

namespace pympa::PYMPA_ISA {

namespace {

template <class T>
void combine_rows_of(const CombineArgs& args, int64_t first, int64_t last) {
  const T* x = static_cast<const T*>(args.x);
  for (int64_t row = first; row < last; ++row) {
    const int32_t* inverse = args.inverse + row * args.inverse_stride;
    const float* weights = args.weights + row * args.weights_stride;
    const T* base = static_cast<const T*>(args.base) + row * args.base_stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    const V gate =
        args.base_gate ? sigmoid(splat(args.base_gate[row * args.base_gate_stride])) : V{};
    for (int64_t i = 0; i < args.columns; i += W) {
      const int64_t count = args.columns - i;
      V sums{};
      for (int64_t c = 0; c < args.chosen; ++c) {
        if (inverse[c] < 0) continue;
        sums = fma(splat(weights[c]), load(x + inverse[c] * args.x_stride + i, count), sums);
      }
      if (args.base_gate) {
        sums = fma(load(base + i, count), gate, sums);
      } else if (args.base) {
        sums += load(base + i, count);
      }
      store(out + i, sums, count);
    }
  }
}

void combine_rows_cpu(const CombineArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    for_row_pieces(args.on.threads, args.rows,
                   [&](int64_t first, int64_t last) { combine_rows_of<T>(args, first, last); });
  });
}

}  // namespace

const ExpertKernels expert_kernels = {combine_rows_cpu};

}  // namespace pympa::PYMPA_ISA
