// Activation functions in float32, for finite x of any size: no step overflows unless the result
// does. Products and sums are fused only where fmaf is called.
#pragma once

#include "cuda/runtime.hpp"
#include "ops/linear.hpp"

namespace pympa::cuda {

__device__ __forceinline__ float sigmoid(float x) { return 1.0F / (1.0F + expf(-x)); }

__device__ __forceinline__ float silu(float x) { return x / (1.0F + expf(-x)); }

// x Phi(x) through erfc, so that the negative tail keeps its relative accuracy.
__device__ __forceinline__ float gelu(float x) { return 0.5F * x * erfcf(-0.707106781F * x); }

// 0.5 x (1 + tanh u) = x / (1 + exp(-2u)): the same value without cancellation.
__device__ __forceinline__ float gelu_tanh(float x) {
  const float u = 0.797884561F * fmaf(0.044715F * x * x, x, x);
  return x / (1.0F + expf(-2.0F * u));
}

// g sigmoid(alpha g) (u + 1) with g = min(gate, limit) and u = up within +-limit; NaN stays NaN.
__device__ __forceinline__ float swiglu_clamped(float gate, float up, float limit, float alpha) {
  const float g = gate > limit ? limit : gate;
  const float u = up > limit ? limit : up < -limit ? -limit : up;
  return g / (1.0F + expf(-alpha * g)) * (u + 1.0F);
}

__device__ __forceinline__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kSilu:
      return silu(x);
    case Activation::kNone:
    case Activation::kSwigluClamped:  // not a function of one number
      break;
  }
  return x;
}

}  // namespace pympa::cuda
