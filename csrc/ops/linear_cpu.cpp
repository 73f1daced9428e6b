// Linear layers: out [M, N] = epilogue(x [M, K] W^T), W packed in panels [K, kPanel].
//
//   x [rows, k-block] -> A (compact, compute format) ; A x panel k-block -> C float32 [rows, cols]
//   C = ascending sum of zero-started partials over k-blocks ; epilogue(C) -> out
//
// An item is one (group, row block, column block) where each group of rows has its own weight; an
// element's bits depend on K and the ISA alone.

#include "cpu/math.hpp"
#include "cpu/pack.hpp"
#include "cpu/parallel.hpp"
#include "ops/linear.hpp"

namespace pympa::PYMPA_ISA {

namespace {

constexpr int64_t kKBlock = 512;       // part of the bit contract: never change it for speed
constexpr int64_t kRowBlock = 96;      // A and C of a block stay in L2 beside one weight panel
constexpr int64_t kColumnBlock = 512;  // x is repacked once for so many columns
constexpr int64_t kPadding = 16;       // keeps A rows off a power-of-two stride (L1 associativity)
constexpr int64_t kAStride = kKBlock + kPadding;
constexpr int64_t kAlignment = 64;

int64_t c_stride(int64_t n) { return min_of(kColumnBlock, round_up(n, kPanel)); }

int64_t thread_bytes(int64_t m, int64_t n, bool gated) {
  const int64_t rows = min_of(kRowBlock, m);
  const int64_t floats = rows * (kAStride + (gated ? 2 : 1) * c_stride(n));
  return round_up(floats * static_cast<int64_t>(sizeof(float)), kAlignment);
}

int64_t workspace_bytes(int64_t m, int64_t n, bool gated, int threads) {
  return threads * thread_bytes(m, n, gated) + kAlignment;
}

template <class Math>
int64_t panel_size(int64_t k) {
  return (k + Math::kDepth - 1) / Math::kDepth * kPanel;
}

int64_t packed_bytes(int64_t n, int64_t k, DType dtype) {
  int64_t bytes = 0;
  with_type(dtype, [&]<class T>() {
    using Math = typename MathOf<T>::Linear;
    bytes = (n + kPanel - 1) / kPanel * panel_size<Math>(k) *
            static_cast<int64_t>(sizeof(typename Math::Stored));
  });
  return bytes;
}

void pack_weight(const PackWeightArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    using Math = typename MathOf<T>::Linear;
    const T* weight = static_cast<const T*>(args.weight);
    auto* panel = static_cast<typename Math::Stored*>(args.packed);
    for (int64_t column = 0; column < args.n; column += kPanel) {
      pack_transposed<Math>(weight + column * args.weight_stride, args.weight_stride, 0,
                            args.n - column, args.k, panel);
      panel += panel_size<Math>(args.k);
    }
  });
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

struct Block {
  int64_t group, row, rows, column, columns;
};

int64_t row_blocks(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }
int64_t column_blocks(int64_t columns) { return (columns + kColumnBlock - 1) / kColumnBlock; }

int64_t count_items(const LinearArgs& args) {
  int64_t blocks = 0;
  for (int64_t group = 0; group < args.groups; ++group)
    blocks += row_blocks(args.group_rows[group]);
  return blocks * column_blocks(args.n);
}

// Row blocks run inside a column block, so that its weights are read from memory once.
Block block_of(const LinearArgs& args, int64_t item) {
  const auto items_of = [&](int64_t group) {
    return row_blocks(args.group_rows[group]) * column_blocks(args.n);
  };
  int64_t group = 0, first_row = 0;
  for (; item >= items_of(group); ++group) {
    item -= items_of(group);
    first_row += args.group_rows[group];
  }
  const int64_t rows = args.group_rows[group];
  const int64_t row = item % row_blocks(rows) * kRowBlock;
  const int64_t column = item / row_blocks(rows) * kColumnBlock;
  return {group, first_row + row, min_of(kRowBlock, rows - row), column,
          min_of(kColumnBlock, args.n - column)};
}

// C [rows, columns] (row stride c_stride) = x W^T for one block.
template <class T>
void product(const LinearArgs& args, int which, const Block& block, float* a_scratch, float* c) {
  using Math = typename MathOf<T>::Linear;
  auto* a = reinterpret_cast<typename Math::Group*>(a_scratch);
  const T* x = static_cast<const T*>(args.x) + block.row * args.x_stride;
  const auto* weight =
      static_cast<const char*>(args.packed[which]) + block.group * args.packed_bytes[which];
  const auto* panels = reinterpret_cast<const typename Math::Stored*>(weight) +
                       block.column / kPanel * panel_size<Math>(args.k);
  const int64_t stride = c_stride(args.n);
  for (int64_t k = 0; k < max_of(args.k, 1); k += kKBlock) {
    const int64_t length = min_of(kKBlock, args.k - k);
    for (int64_t row = 0; row < block.rows; ++row) {
      pack_row<Math>(x + row * args.x_stride + k, length, a + row * kAStride);
    }
    for (int64_t column = 0; column < block.columns; column += kPanel) {
      const auto* panel =
          panels + column / kPanel * panel_size<Math>(args.k) + k / Math::kDepth * kPanel;
      const int vectors = static_cast<int>(min_of(kPanel, block.columns - column) + W - 1) / W;
      for (int64_t row = 0; row < block.rows; row += kStrip) {
        float* target = c + row * stride + column;
        const int rows = static_cast<int>(min_of(kStrip, block.rows - row));
        any_tile<Math>(rows, vectors, a + row * kAStride, kAStride, panel,
                       (length + Math::kDepth - 1) / Math::kDepth, [&](int r, int v, V sums) {
                         float* at = target + r * stride + v * W;
                         store(at, k == 0 ? sums : load(at) + sums);
                       });
      }
    }
  }
}

template <class T>
const T* bias_of(const LinearArgs& args, int which, int64_t group) {
  const T* bias = static_cast<const T*>(args.bias[which]);
  return bias ? bias + group * args.bias_stride[which] : nullptr;
}

// out, branch [rows, columns] from C (and the second C of a gated layer).
template <class T, class Out>
void epilogue(const LinearArgs& args, const Block& block, const float* c, const float* c_up) {
  const T* bias = bias_of<T>(args, 0, block.group);
  const T* bias_up = bias_of<T>(args, 1, block.group);
  const int64_t stride = c_stride(args.n);
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.row + r;
    for (int64_t i = 0; i < block.columns; i += W) {
      const int64_t column = block.column + i;
      const int64_t count = block.columns - i;
      V y = load(c + r * stride + i);
      if (bias) y += load(bias + column, count);
      y = activate(y, args.activation);
      if (c_up) {
        V up = load(c_up + r * stride + i);
        if (bias_up) up += load(bias_up + column, count);
        y *= up;
      }
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

template <class T>
void linear_typed(const LinearArgs& args) {
  const bool gated = args.packed[1] != nullptr;
  const int64_t bytes = thread_bytes(args.m, args.n, gated);
  const auto base = round_up(reinterpret_cast<int64_t>(args.workspace), kAlignment);
  for_each_item(args.threads, count_items(args), [&](int64_t item, int thread) {
    const Block block = block_of(args, item);
    const int64_t rows = min_of(kRowBlock, args.m);
    float* a = reinterpret_cast<float*>(base + thread * bytes);
    float* c = a + rows * kAStride;
    float* c_up = gated ? c + rows * c_stride(args.n) : nullptr;
    product<T>(args, 0, block, a, c);
    if (gated) product<T>(args, 1, block, a, c_up);
    if (args.out_dtype == args.dtype) {
      epilogue<T, T>(args, block, c, c_up);
    } else {
      epilogue<T, float>(args, block, c, c_up);
    }
  });
}

void linear_cpu(const LinearArgs& args) {
  with_type(args.dtype, [&]<class T>() { linear_typed<T>(args); });
}

}  // namespace

const LinearKernels linear_kernels = {packed_bytes, workspace_bytes, pack_weight, linear_cpu};

}  // namespace pympa::PYMPA_ISA
