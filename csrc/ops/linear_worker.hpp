// Pieces of linear layers and MLPs: x [rows, K] times W^T from panels [K, kPanel], block by block.
//
// An element is the ascending sum of partials over k-blocks, each started at zero. So its bits
// depend only on K and the ISA, not on rows, columns or threads.
#pragma once

#include "cpu/math.hpp"
#include "cpu/pack.hpp"
#include "cpu/stream.hpp"
#include "ops/linear.hpp"

namespace pympa::PYMPA_ISA {

constexpr int64_t kKBlock = 512;       // part of the contract on bits: never change it for speed
constexpr int64_t kRowBlock = 96;      // A and C of a block stay in L2 beside one weight panel
constexpr int64_t kColumnBlock = 512;  // x is repacked once for so many columns
constexpr int64_t kPadding = 16;       // keeps A rows off a power-of-two stride (L1 associativity)
constexpr int64_t kAStride = kKBlock + kPadding;
constexpr int64_t kAlignment = 64;
constexpr int64_t kMostStreamed = 16;  // rows; more gain little, and sums take scratch

// Whether reading the weight is most of the work. One row reads it best as it comes.
template <class Math>
bool is_streamed(int64_t rows) {
  return rows > 1 && rows <= (Math::kWidens ? kMostStreamed / 4 : kMostStreamed);
}

template <class Math>
int64_t panel_size(int64_t k) {
  return (k + Math::kDepth - 1) / Math::kDepth * kPanel;
}

PYMPA_INLINE V activate(V x, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kSilu:
      return silu(x);
    case Activation::kNone:
      break;
  }
  return x;
}

// Rows and columns of one group's product.
struct Block {
  int64_t group, row, rows, column, columns;
};

// C [rows, columns] (row stride `stride`) of float32 sums.
struct Sums {
  float* at;
  int64_t stride;
};

template <class T>
using LinearGroup = typename MathOf<T>::Linear::Group;

// C [rows, kPanel] (+)= A x panel for few rows; `next` is the panel that is read after this one.
template <class Math>
void add_panel(int64_t rows, const typename Math::Group* a, const typename Math::Stored* panel,
               const typename Math::Stored* next, int64_t groups, bool from_zero, Sums c) {
  float sums[kMostStreamed * kPanel];
  stream_panel<Math>(rows, a, kAStride, panel, next, groups, sums);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < kPanel; i += W) {
      float* at = c.at + row * c.stride + i;
      const V sum = load(sums + row * kPanel + i);
      store(at, from_zero ? sum : load(at) + sum);
    }
  }
}

// Adds the partial of one k-block: A [rows, length] times the columns' panels, from group k on.
template <class T>
void add_partial(const LinearArgs& args, int which, const Block& block, int64_t k, int64_t length,
                 const LinearGroup<T>* a, Sums c) {
  using Math = typename MathOf<T>::Linear;
  const auto* weight =
      static_cast<const char*>(args.packed[which]) + block.group * args.packed_bytes[which];
  const auto* panels = reinterpret_cast<const typename Math::Stored*>(weight) +
                       block.column / kPanel * panel_size<Math>(args.k);
  const int64_t groups = (length + Math::kDepth - 1) / Math::kDepth;
  for (int64_t column = 0; column < block.columns; column += kPanel) {
    const auto* panel =
        panels + column / kPanel * panel_size<Math>(args.k) + k / Math::kDepth * kPanel;
    if (groups > 0 && is_streamed<Math>(block.rows)) {
      const auto* next = panel + panel_size<Math>(args.k);  // the next block's after the last
      if (column + kPanel >= block.columns && k + kKBlock < args.k) {
        next = panels + (k + kKBlock) / Math::kDepth * kPanel;
      } else if (column + kPanel >= block.columns) {
        next -= k / Math::kDepth * kPanel;
      }
      add_panel<Math>(block.rows, a, panel, next, groups, k == 0, {c.at + column, c.stride});
      continue;
    }
    const int vectors = static_cast<int>(min_of(kPanel, block.columns - column) + W - 1) / W;
    for (int64_t row = 0; row < block.rows; row += kStrip) {
      float* target = c.at + row * c.stride + column;
      const int rows = static_cast<int>(min_of(kStrip, block.rows - row));
      // The sums may have left the nearest cache; they are needed when the tile is done.
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors; ++v) __builtin_prefetch(target + r * c.stride + v * W, 1);
      }
      any_tile<Math>(rows, vectors, a + row * kAStride, kAStride, panel, groups,
                     [&](int r, int v, V sums) {
                       float* at = target + r * c.stride + v * W;
                       store(at, k == 0 ? sums : load(at) + sums);
                     });
    }
  }
}

// C = x W^T for one block; `a` is scratch for [rows, kAStride].
template <class T>
void product(const LinearArgs& args, int which, const Block& block, LinearGroup<T>* a, Sums c) {
  const T* x = static_cast<const T*>(args.x) + block.row * args.x_stride;
  for (int64_t k = 0; k < max_of(args.k, 1); k += kKBlock) {
    const int64_t length = min_of(kKBlock, args.k - k);
    for (int64_t row = 0; row < block.rows; ++row) {
      pack_row<typename MathOf<T>::Linear>(x + row * args.x_stride + k, length, a + row * kAStride);
    }
    add_partial<T>(args, which, block, k, length, a, c);
  }
}

template <class T>
const T* bias_of(const LinearArgs& args, int which, int64_t group) {
  const T* bias = static_cast<const T*>(args.bias[which]);
  return bias ? bias + group * args.bias_stride[which] : nullptr;
}

// What `count` columns from `column` on become: act(C + bias), times (C of up + bias) if gated.
template <class T>
PYMPA_INLINE V epilogue_lanes(const LinearArgs& args, const float* c, const float* c_up,
                              const T* bias, const T* bias_up, int64_t column, int64_t count) {
  V y = load(c);
  if (bias) y += load(bias + column, count);
  y = activate(y, args.activation);
  if (!c_up) return y;
  V up = load(c_up);
  if (bias_up) up += load(bias_up + column, count);
  return y * up;
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
