// Element types and their conversions, with the same names on a GPU and under emulation.
#pragma once

#include "core/dtype.hpp"
#include "cuda/runtime.hpp"

namespace pympa::cuda {

using BFloat = __nv_bfloat16;
using Half = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(BFloat x) { return __bfloat162float(x); }

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ BFloat from_float<BFloat>(float x) {
  return __float2bfloat16_rn(x);
}

// N elements that move in one access; N * sizeof(T) is 16 at most, and the address a multiple of
// it.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

// Calls run.template operator()<T>() with the element type of `dtype`.
template <class Run>
void with_type(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run.template operator()<float>();
    case DType::kFloat16:
      return run.template operator()<Half>();
    case DType::kBFloat16:
      return run.template operator()<BFloat>();
    default:
      throw std::invalid_argument("CUDA kernels: expected dtype float32, float16 or bfloat16");
  }
}

}  // namespace pympa::cuda
