// The part of a linear layer on the GPU after the sums, where gemm's own epilogue cannot do it:
//
//   y = act(C + bias), gated: times (C of up + bias), or kSwigluClamped of both
//   branch = round(y) ; out = round(residual + branch)
//
// Each element of C is read once, in float32, and each result is rounded once.
#pragma once

#include "cuda/math.hpp"
#include "cuda/rows.hpp"

namespace pympa::cuda {

// What becomes of the sums of some rows. Sums of no products have no array.
template <class T, class Out>
struct Epilogue {
  Rows<const float> c[2];  // [1] of the "up" product of a gated layer, else null
  const T* bias[2];
  Activation activation;
  float limit, alpha;  // of kSwigluClamped
  Rows<const Out> residual;
  Rows<Out> branch, out;
  bool gated, aligned;
};

template <bool kWhole, int kCount, class T>
__device__ __forceinline__ void add_to(const T* from, std::int64_t left, float (&y)[kCount]) {
  float x[kCount];
  load<kWhole>(from, left, x);
#pragma unroll
  for (int i = 0; i < kCount; ++i) y[i] += x[i];
}

// What becomes of the sums of a gated layer.
template <class T, class Out>
__device__ __forceinline__ float gated_value(const Epilogue<T, Out>& args, float gate, float up) {
  return args.activation == Activation::kSwigluClamped
             ? swiglu_clamped(gate, up, args.limit, args.alpha)
             : activate(gate, args.activation) * up;
}

template <class T, class Out>
__global__ void epilogue_kernel(Epilogue<T, Out> args, std::int64_t rows, std::int64_t n) {
  constexpr int kCount = kGroup<T>;
  for_each_group<kCount>(
      rows, n, args.aligned,
      [&]<bool kWhole>(std::int64_t row, std::int64_t column, std::int64_t left) {
        const auto sums = [&](int which, float (&y)[kCount]) {
          const Rows<const float>& c = args.c[which];
          const T* bias = args.bias[which];
          if (c.at) load<kWhole>(c(row, column), left, y);
          if (bias) add_to<kWhole>(bias + column, left, y);
        };
        float y[kCount] = {};
        sums(0, y);
        if (args.gated) {
          float up[kCount] = {};
          sums(1, up);
#pragma unroll
          for (int i = 0; i < kCount; ++i) y[i] = gated_value(args, y[i], up[i]);
        } else {
#pragma unroll
          for (float& value : y) value = activate(value, args.activation);
        }
        if (args.branch.at) store<kWhole>(args.branch(row, column), left, y);
        if (args.residual.at) {
#pragma unroll
          for (float& value : y) value = to_float(from_float<Out>(value));
          add_to<kWhole>(args.residual(row, column), left, y);
        }
        store<kWhole>(args.out(row, column), left, y);
      });
}

}  // namespace pympa::cuda
