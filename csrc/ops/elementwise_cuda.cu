// Elementwise sums of rows [rows, columns] in float32, rounded once, and the cap on logits. Memory
// bandwidth limits them: `add` moves three elements for each output, `sum_partials` parts + 1,
// `softcap` two.

#include "cuda/rows.hpp"
#include "ops/elementwise.hpp"

namespace pympa::cuda {

namespace {

template <class T>
__global__ void add_kernel(Rows<const T> a, Rows<const T> b, Rows<T> out, std::int64_t rows,
                           std::int64_t columns, bool aligned) {
  constexpr int kCount = kGroup<T>;
  for_each_group<kCount>(
      rows, columns, aligned,
      [&]<bool kWhole>(std::int64_t row, std::int64_t column, std::int64_t left) {
        float x[kCount], y[kCount];
        load<kWhole>(a(row, column), left, x);
        load<kWhole>(b(row, column), left, y);
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] += y[i];
        store<kWhole>(out(row, column), left, x);
      });
}

template <class T>
struct Partials {
  const T* at;
  std::int64_t parts, part_stride, row_stride;
};

template <class T>
__global__ void sum_partials_kernel(Partials<T> x, const T* bias, Rows<T> out, std::int64_t rows,
                                    std::int64_t columns, bool aligned) {
  constexpr int kCount = kGroup<T>;
  for_each_group<kCount>(
      rows, columns, aligned,
      [&]<bool kWhole>(std::int64_t row, std::int64_t column, std::int64_t left) {
        const T* from = x.at + row * x.row_stride + column;
        float sums[kCount] = {};
#pragma unroll 4  // loads of several parts are under way together
        for (std::int64_t part = 0; part < x.parts; ++part) {
          float y[kCount];
          load<kWhole>(from + part * x.part_stride, left, y);
#pragma unroll
          for (int i = 0; i < kCount; ++i) sums[i] += y[i];
        }
        if (bias) {
          float y[kCount];
          load<kWhole>(bias + column, left, y);
#pragma unroll
          for (int i = 0; i < kCount; ++i) sums[i] += y[i];
        }
        store<kWhole>(out(row, column), left, sums);
      });
}

__global__ void softcap_kernel(Rows<float> x, std::int64_t rows, std::int64_t columns, float cap,
                               bool aligned) {
  constexpr int kCount = kGroup<float>;
  for_each_group<kCount>(
      rows, columns, aligned,
      [&]<bool kWhole>(std::int64_t row, std::int64_t column, std::int64_t left) {
        float y[kCount];
        load<kWhole>(x(row, column), left, y);
#pragma unroll
        for (float& value : y) value = cap * tanhf(value / cap);
        store<kWhole>(x(row, column), left, y);
      });
}

void add_cuda(const AddArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    const Rows<const T> a{static_cast<const T*>(args.a), args.a_stride};
    const Rows<const T> b{static_cast<const T*>(args.b), args.b_stride};
    const Rows<T> out{static_cast<T*>(args.out), args.out_stride};
    const auto [grid, block] = row_grid(args.rows, ceil_div(args.columns, kGroup<T>));
    launch(add_kernel<T>, grid, block, 0, args.on.stream, a, b, out, args.rows, args.columns,
           is_aligned(a) && is_aligned(b) && is_aligned(out));
  });
}

void sum_partials_cuda(const SumArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    const T* at = static_cast<const T*>(args.x);
    const T* bias = static_cast<const T*>(args.bias);
    const Partials<T> x{at, args.parts, args.part_stride, args.row_stride};
    const Rows<T> out{static_cast<T*>(args.out), args.out_stride};
    const bool aligned = is_aligned(Rows<const T>{at, args.part_stride}) &&
                         is_aligned(Rows<const T>{at, args.row_stride}) &&
                         is_aligned(Rows<const T>{bias, 0}) && is_aligned(out);
    const auto [grid, block] = row_grid(args.rows, ceil_div(args.columns, kGroup<T>));
    launch(sum_partials_kernel<T>, grid, block, 0, args.on.stream, x, bias, out, args.rows,
           args.columns, aligned);
  });
}

void softcap_cuda(const SoftcapArgs& args) {
  const Rows<float> x{args.x, args.stride};
  const auto [grid, block] = row_grid(args.rows, ceil_div(args.columns, kGroup<float>));
  launch(softcap_kernel, grid, block, 0, args.on.stream, x, args.rows, args.columns, args.cap,
         is_aligned(x));
}

}  // namespace

const ElementwiseKernels elementwise_kernels = {add_cuda, sum_partials_cuda, softcap_cuda};

}  // namespace pympa::cuda
