// What follows the sums of a linear layer on the GPU, for what gemm's own epilogue cannot do:
//
//   y = act(C + bias), gated: times (C of up + bias) ; branch = round(y) ; out = round(residual +
//   branch)
//
// Each element of C is read once, in float32, and each result is rounded once.
#pragma once

#include "cuda/math.hpp"
#include "cuda/rows.hpp"

namespace pympa::cuda {

// What becomes of the sums of some rows. Sums of no products have no array.
template <class T, class Out>
struct Finish {
  Rows<const float> c[2];  // [1] of the "up" product of a gated layer, else null
  const T* bias[2];
  Activation activation;
  Rows<const Out> residual;
  Rows<Out> branch, out;
  bool gated, aligned;
};

template <int kCount, class T>
__device__ __forceinline__ void add_to(const T* from, std::int64_t left, bool aligned,
                                       float (&y)[kCount]) {
  if (!from) return;
  float x[kCount];
  load(from, left, aligned, x);
#pragma unroll
  for (int i = 0; i < kCount; ++i) y[i] += x[i];
}

template <class T, class Out>
__global__ void finish_kernel(Finish<T, Out> args, std::int64_t rows, std::int64_t n) {
  constexpr int kCount = kGroup<T>;
  for_each_group(rows, (n + kCount - 1) / kCount, [&](std::int64_t row, std::int64_t group) {
    const std::int64_t column = group * kCount, left = n - column;
    const auto sums = [&](int which, float (&y)[kCount]) {
      const Rows<const float>& c = args.c[which];
      const T* bias = args.bias[which];
      add_to(c.at ? c(row, column) : nullptr, left, true, y);
      add_to(bias ? bias + column : nullptr, left, args.aligned, y);
    };
    float y[kCount] = {};
    sums(0, y);
#pragma unroll
    for (float& value : y) value = activate(value, args.activation);
    if (args.gated) {
      float up[kCount] = {};
      sums(1, up);
#pragma unroll
      for (int i = 0; i < kCount; ++i) y[i] *= up[i];
    }
    if (args.branch.at) store(args.branch(row, column), left, args.aligned, y);
    if (args.residual.at) {
      float x[kCount];
      load(args.residual(row, column), left, args.aligned, x);
#pragma unroll
      for (int i = 0; i < kCount; ++i) y[i] = x[i] + to_float(from_float<Out>(y[i]));
    }
    store(args.out(row, column), left, args.aligned, y);
  });
}

}  // namespace pympa::cuda
