// Linear layers: out [M, N] = epilogue(x [M, K] W^T), W packed in panels [K, kPanel].
//
//   x [rows, k-block] -> A (compact, compute format) ; A x panel k-block -> C float32 [rows, cols]
//   C = ascending sum of partials over k-blocks, each started at zero ; epilogue(C) -> out
//
// An item is one (group, row block, column block), if each group of rows has its own weight; an
// element's bits depend only on K and the ISA.

#include "cpu/parallel.hpp"
#include "ops/linear_worker.hpp"

namespace pympa::PYMPA_ISA {

namespace {

int64_t c_stride(int64_t n) { return min_of(kColumnBlock, round_up(n, kPanel)); }

int64_t thread_bytes(int64_t m, int64_t n, bool gated) {
  const int64_t rows = min_of(kRowBlock, m);
  const int64_t floats = rows * (kAStride + (gated ? 2 : 1) * c_stride(n));
  return round_up(floats * static_cast<int64_t>(sizeof(float)), kAlignment);
}

int64_t workspace_bytes(int64_t m, int64_t n, bool gated, const Execution& on) {
  return on.threads * thread_bytes(m, n, gated) + kAlignment;
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
    auto* panels = static_cast<typename Math::Stored*>(args.packed);
    for_row_pieces(
        args.on.threads, (args.n + kPanel - 1) / kPanel, [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            const int64_t column = i * kPanel;
            pack_transposed<Math>(weight + column * args.weight_stride, args.weight_stride, 0,
                                  args.n - column, args.k, panels + i * panel_size<Math>(args.k));
          }
        });
  });
}

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

template <class T>
void linear_typed(const LinearArgs& args) {
  const bool gated = args.packed[1] != nullptr;
  const int64_t bytes = thread_bytes(args.m, args.n, gated);
  const auto base = round_up(reinterpret_cast<int64_t>(args.workspace), kAlignment);
  for_each_item(args.on.threads, count_items(args), [&](int64_t item, int thread) {
    const Block block = block_of(args, item);
    const int64_t rows = min_of(kRowBlock, args.m);
    auto* a = reinterpret_cast<LinearGroup<T>*>(base + thread * bytes);
    const Sums c{reinterpret_cast<float*>(a) + rows * kAStride, c_stride(args.n)};
    float* c_up = gated ? c.at + rows * c.stride : nullptr;
    product<T>(args, 0, block, a, c);
    if (gated) product<T>(args, 1, block, a, {c_up, c.stride});
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
