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

template <class T>
int64_t thread_bytes(int64_t m, int64_t n, bool gated) {
  const int64_t rows = min_of(LinearProducts<T>::kRowBlock, m);
  const int64_t sums = rows * (gated ? 2 : 1) * c_stride(n);
  return round_up(LinearProducts<T>::scratch_bytes(rows), kAlignment) +
         round_up(sums * static_cast<int64_t>(sizeof(float)), kAlignment);
}

int64_t workspace_bytes(int64_t m, int64_t n, DType dtype, bool gated, const Execution& on) {
  int64_t bytes = 0;
  with_type(dtype, [&]<class T>() { bytes = thread_bytes<T>(m, n, gated); });
  return on.threads * bytes + kAlignment;
}

int64_t packed_bytes(int64_t n, int64_t k, DType dtype) {
  int64_t bytes = 0;
  with_type(dtype, [&]<class T>() {
    bytes = (n + kPanel - 1) / kPanel * panel_size<T>(k) * static_cast<int64_t>(sizeof(Panel<T>));
  });
  return bytes;
}

void pack_weight(const PackWeightArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    using Math = typename MathOf<T>::Linear;
    const T* weight = static_cast<const T*>(args.weight);
    auto* panels = static_cast<Panel<T>*>(args.packed);
    for_row_pieces(
        args.on.threads, (args.n + kPanel - 1) / kPanel, [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            const int64_t column = i * kPanel;
            pack_transposed<Math>(weight + column * args.weight_stride, args.weight_stride, 0,
                                  args.n - column, args.k, panels + i * panel_size<T>(args.k));
          }
        });
  });
}

// Blocks of at most `most_rows` rows: each is an item.
struct Items {
  const LinearArgs& args;
  int64_t most_rows, count = 0;

  // Blocks are halved until all threads have work.
  Items(const LinearArgs& call, int64_t row_block) : args(call), most_rows(row_block) {
    constexpr int64_t kItemsPerThread = 4, kLeastRows = 96;
    count_items();
    while (args.on.threads > 1 && count < args.on.threads * kItemsPerThread &&
           most_rows / 2 >= kLeastRows) {
      most_rows /= 2;
      count_items();
    }
  }

  void count_items() {
    count = 0;
    for (int64_t group = 0; group < args.groups; ++group) count += items_of(args.group_rows[group]);
  }

  int64_t row_blocks(int64_t rows) const { return (rows + most_rows - 1) / most_rows; }

  int64_t items_of(int64_t rows) const {
    return row_blocks(rows) * ((args.n + kColumnBlock - 1) / kColumnBlock);
  }

  // Row blocks run inside a column block, so that its weights are read from memory once.
  Block block_of(int64_t item) const {
    int64_t group = 0, first_row = 0;
    for (; item >= items_of(args.group_rows[group]); ++group) {
      item -= items_of(args.group_rows[group]);
      first_row += args.group_rows[group];
    }
    const int64_t rows = args.group_rows[group];
    const int64_t row = item % row_blocks(rows) * most_rows;
    const int64_t column = item / row_blocks(rows) * kColumnBlock;
    return {group, first_row + row, min_of(most_rows, rows - row), column,
            min_of(kColumnBlock, args.n - column)};
  }
};

template <class T>
void linear_typed(const LinearArgs& args) {
  const bool gated = args.packed[1] != nullptr;
  const int64_t rows = min_of(LinearProducts<T>::kRowBlock, args.m);
  const int64_t bytes = thread_bytes<T>(args.m, args.n, gated);
  const auto base = round_up(reinterpret_cast<int64_t>(args.workspace), kAlignment);
  const Items items(args, LinearProducts<T>::kRowBlock);
  for_each_item(args.on.threads, items.count, [&](int64_t item, int thread) {
    const Block block = items.block_of(item);
    char* scratch = reinterpret_cast<char*>(base + thread * bytes);
    LinearProducts<T> products(scratch, rows);
    scratch += round_up(LinearProducts<T>::scratch_bytes(rows), kAlignment);
    const Sums c{reinterpret_cast<float*>(scratch), c_stride(args.n)};
    float* c_up = gated ? c.at + rows * c.stride : nullptr;
    product<T>(args, 0, block, products, c);
    if (gated) product<T>(args, 1, block, products, {c_up, c.stride});
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
