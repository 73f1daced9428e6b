// Mixture of experts: the weighted sum of what experts return
//
//   out [rows, columns] = round(x[inverse 0] * weight 0 + x[inverse 1] * weight 1 + ... + base)
//
// where base is times sigmoid(gate [rows, 1]) if there is one. It reads chosen + 1 elements for
// each that it writes.

#include "cuda/math.hpp"
#include "cuda/rows.hpp"
#include "ops/experts.hpp"

namespace pympa::cuda {

namespace {

template <class T>
struct Combine {
  Rows<const T> x, base;
  Rows<const std::int32_t> inverse;
  Rows<const float> weights, base_gate;
  Rows<T> out;
  std::int64_t rows, columns;
  int chosen;
  bool aligned;
};

template <class T>
__global__ void combine_rows_kernel(Combine<T> args) {
  constexpr int kCount = kGroup<T>;
  for_each_group<kCount>(
      args.rows, args.columns, args.aligned,
      [&]<bool kWhole>(std::int64_t row, std::int64_t column, std::int64_t left) {
        float sums[kCount] = {};
#pragma unroll 4  // loads of several choices are under way together
        for (int choice = 0; choice < args.chosen; ++choice) {
          const std::int32_t place = *args.inverse(row, choice);
          const float weight = *args.weights(row, choice);
          Group<T> x{};
          if (place >= 0) x = read<kWhole>(args.x(place, column), left);
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            sums[i] = place >= 0 ? fmaf(weight, to_float(x.at[i]), sums[i]) : sums[i];
          }
        }
        if (args.base.at) {
          float y[kCount];
          load<kWhole>(args.base(row, column), left, y);
          // A factor of 1 leaves the bits of a sum as they are.
          const float gate = args.base_gate.at ? sigmoid(*args.base_gate(row, 0)) : 1.0F;
#pragma unroll
          for (int i = 0; i < kCount; ++i) sums[i] = fmaf(y[i], gate, sums[i]);
        }
        store<kWhole>(args.out(row, column), left, sums);
      });
}

void combine_rows_cuda(const CombineArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    Combine<T> combine{{static_cast<const T*>(args.x), args.x_stride},
                       {static_cast<const T*>(args.base), args.base_stride},
                       {args.inverse, args.inverse_stride},
                       {args.weights, args.weights_stride},
                       {args.base_gate, args.base_gate_stride},
                       {static_cast<T*>(args.out), args.out_stride},
                       args.rows,
                       args.columns,
                       static_cast<int>(args.chosen),
                       false};
    combine.aligned = is_aligned(combine.x) && is_aligned(combine.base) && is_aligned(combine.out);
    const auto [grid, block] = row_grid(args.rows, ceil_div(args.columns, kGroup<T>));
    launch(combine_rows_kernel<T>, grid, block, 0, args.on.stream, combine);
  });
}

}  // namespace

const ExpertKernels expert_kernels = {combine_rows_cuda};

}  // namespace pympa::cuda
