// Pieces of linear layers and MLPs: x [rows, K] times W^T from panels [K, kPanel], block by block.
//
// An element is the ascending sum of partials over k-blocks, each started at zero. So its bits
// depend only on K and the ISA, not on rows, columns or threads.
#pragma once

#include "cpu/math.hpp"
#if PYMPA_ISA_LEVEL == 4
#include "ops/linear_tiles.hpp"
#else
#include "ops/linear_vectors.hpp"
#endif

namespace pympa::PYMPA_ISA {

PYMPA_INLINE V activate(V x, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kSilu:
      return silu(x);
    case Activation::kNone:
    case Activation::kSwigluClamped:  // not a function of one sum
      break;
  }
  return x;
}

// C = x W^T for one block.
template <class T>
void product(const LinearArgs& args, int which, const Block& block, LinearProducts<T>& products,
             Sums c) {
  const T* x = static_cast<const T*>(args.x) + block.row * args.x_stride;
  for (int64_t k = 0; k < max_of(args.k, 1); k += kKBlock) {
    const int64_t length = min_of(kKBlock, args.k - k);
    for (int64_t row = 0; row < block.rows; ++row) {
      products.pack_row(x + row * args.x_stride + k, length, row);
    }
    products.add_partial(args, which, block, k, length, c);
  }
}

template <class T>
const T* bias_of(const LinearArgs& args, int which, int64_t group) {
  const T* bias = static_cast<const T*>(args.bias[which]);
  return bias ? bias + group * args.bias_stride[which] : nullptr;
}

// The outputs of columns [column, column + count). Not gated: act(C + bias). Gated: act(C + bias)
// times (C of up + bias of up), or with kSwigluClamped the clamped SwiGLU of these two sums.
template <class T>
PYMPA_INLINE V epilogue_lanes(const LinearArgs& args, const float* c, const float* c_up,
                              const T* bias, const T* bias_up, int64_t column, int64_t count) {
  V y = load(c);
  if (bias) y += load(bias + column, count);
  if (!c_up) return activate(y, args.activation);
  V up = load(c_up);
  if (bias_up) up += load(bias_up + column, count);
  if (args.activation == Activation::kSwigluClamped) {
    return swiglu_clamped(y, up, splat(args.limit), splat(args.alpha));
  }
  return activate(y, args.activation) * up;
}

// out, branch [rows, columns] from C (and the second C of a gated layer, of the same stride).
template <class T, class Out>
void epilogue(const LinearArgs& args, const Block& block, Sums c, const float* c_up) {
  const T* bias = bias_of<T>(args, 0, block.group);
  const T* bias_up = bias_of<T>(args, 1, block.group);
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.row + r;
    for (int64_t i = 0; i < block.columns; i += W) {
      const int64_t column = block.column + i, at = r * c.stride + i;
      const int64_t count = block.columns - i;
      V y =
          epilogue_lanes(args, c.at + at, c_up ? c_up + at : nullptr, bias, bias_up, column, count);
      if (args.branch) {
        store(static_cast<Out*>(args.branch) + row * args.branch_stride + column, y, count);
      }
      if (args.residual) {
        const Out* residual = static_cast<const Out*>(args.residual);
        y = load(residual + row * args.residual_stride + column, count) + round_to<Out>(y);
      }
      store(static_cast<Out*>(args.out) + row * args.out_stride + column, y, count);
    }
  }
}

}  // namespace pympa::PYMPA_ISA
