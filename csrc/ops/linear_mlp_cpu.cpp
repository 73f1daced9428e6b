// MLPs whose hidden state is never stored as a whole:
//
//   for each block of kKBlock hidden columns, and the rows of an item in row blocks:
//     x W_up^T (and x W_gate^T) -> C -> act, gate, round -> A [rows, kKBlock]
//     A x the block's part of W_down -> added to float32 sums [rows, outputs]
//   epilogue(sums) -> out
//
// A block of hidden columns is a k-block of the second product, so sums have the order of two
// linears. An item is one (group, piece of its rows): the weights of a block of hidden columns stay
// in the cache from one row block to the next, and are read again for the next item.

#include "cpu/parallel.hpp"
#include "ops/linear_worker.hpp"

namespace pympa::PYMPA_ISA {

namespace {

// The padding keeps rows off a power-of-two stride (L1 associativity).
int64_t sums_stride(int64_t n) { return round_up(n, kPanel) + W; }

template <class T>
int64_t thread_bytes(int64_t item_rows, int64_t hidden, int64_t n, bool gated) {
  const int64_t rows = min_of(LinearProducts<T>::kRowBlock, item_rows);
  const int64_t block = (gated ? 2 : 1) * min_of(kColumnBlock, round_up(hidden, kPanel));
  const int64_t sums = rows * block + item_rows * sums_stride(n);
  return round_up(LinearProducts<T>::scratch_bytes(rows), kAlignment) +
         round_up(sums * static_cast<int64_t>(sizeof(float)), kAlignment);
}

int64_t workspace_bytes(int64_t item_rows, int64_t hidden, int64_t n, DType dtype, bool gated,
                        const Execution& on) {
  int64_t bytes = 0;
  with_type(dtype, [&]<class T>() { bytes = thread_bytes<T>(item_rows, hidden, n, gated); });
  return on.threads * bytes + kAlignment;
}

template <class T>
struct Worker {
  using Products = LinearProducts<T>;

  const MlpArgs& args;
  const int64_t row_block;
  char* const scratch;
  Products products;
  Sums c;
  float* c_up;
  Sums sums;

  Worker(const MlpArgs& call, int thread)
      : args(call),
        row_block(min_of(Products::kRowBlock, call.item_rows)),
        scratch(scratch_of(call, thread)),
        products(scratch, row_block) {
    const bool gated = args.up.packed[1] != nullptr;
    c = {reinterpret_cast<float*>(scratch +
                                  round_up(Products::scratch_bytes(row_block), kAlignment)),
         min_of(kColumnBlock, round_up(args.up.n, kPanel))};
    c_up = gated ? c.at + row_block * c.stride : nullptr;
    sums = {c.at + (gated ? 2 : 1) * row_block * c.stride, sums_stride(args.down.n)};
  }

  static char* scratch_of(const MlpArgs& args, int thread) {
    const auto base = round_up(reinterpret_cast<int64_t>(args.up.workspace), kAlignment);
    const bool gated = args.up.packed[1] != nullptr;
    return reinterpret_cast<char*>(
        base + thread * thread_bytes<T>(args.item_rows, args.up.n, args.down.n, gated));
  }

  // A = the hidden state of one block, rounded to T.
  void make_hidden(const Block& block) {
    product<T>(args.up, 0, block, products, c);
    if (c_up) product<T>(args.up, 1, block, products, {c_up, c.stride});
    const T* bias = bias_of<T>(args.up, 0, block.group);
    const T* bias_up = bias_of<T>(args.up, 1, block.group);
    T hidden[kColumnBlock];
    for (int64_t r = 0; r < block.rows; ++r) {
      for (int64_t i = 0; i < block.columns; i += W) {
        const int64_t at = r * c.stride + i, count = block.columns - i;
        store(hidden + i,
              epilogue_lanes(args.up, c.at + at, c_up ? c_up + at : nullptr, bias, bias_up,
                             block.column + i, count),
              count);
      }
      products.pack_row(hidden, block.columns, r);
    }
  }

  void run(int64_t group, int64_t row, int64_t rows) {
    for (int64_t hidden = 0; hidden < max_of(args.up.n, 1); hidden += kKBlock) {
      const int64_t columns = min_of(kKBlock, args.up.n - hidden);
      for (int64_t at = 0; at < rows; at += row_block) {
        const int64_t count = min_of(row_block, rows - at);
        make_hidden({group, row + at, count, hidden, columns});
        const Sums here{sums.at + at * sums.stride, sums.stride};
        products.add_partial(args.down, 0, {group, row + at, count, 0, args.down.n}, hidden,
                             columns, here);
      }
    }
    const Block whole{group, row, rows, 0, args.down.n};
    if (args.down.out_dtype == args.down.dtype) {
      epilogue<T, T>(args.down, whole, sums, nullptr);
    } else {
      epilogue<T, float>(args.down, whole, sums, nullptr);
    }
  }
};

static_assert(kKBlock == kColumnBlock,
              "a block of hidden columns is a k-block of the next product");

template <class T>
void mlp_typed(const MlpArgs& args) {
  const auto items_of = [&](int64_t group) {
    return (args.up.group_rows[group] + args.item_rows - 1) / args.item_rows;
  };
  int64_t items = 0;
  for (int64_t group = 0; group < args.up.groups; ++group) items += items_of(group);
  for_each_item(args.up.on.threads, items, [&](int64_t item, int thread) {
    int64_t group = 0, first = 0;
    for (; item >= items_of(group); ++group) {
      item -= items_of(group);
      first += args.up.group_rows[group];
    }
    const int64_t row = item * args.item_rows;
    Worker<T>(args, thread)
        .run(group, first + row, min_of(args.item_rows, args.up.group_rows[group] - row));
  });
}

void mlp_cpu(const MlpArgs& args) {
  with_type(args.up.dtype, [&]<class T>() { mlp_typed<T>(args); });
}

}  // namespace

const MlpKernels mlp_kernels = {workspace_bytes, mlp_cpu};

}  // namespace pympa::PYMPA_ISA
