// Normalisation of rows [rows, columns] in float32, rounded once; gain = weight + offset.
//
//   rms:   y = x / sqrt(mean(x^2) + eps) * gain + bias
//   layer: y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * gain + bias    (two passes)
//
// sum_squares: sums x^2 [rows, 1], from which rms has mean(x^2) where x is a part of its rows.
//
// One warp processes a row, or one block if the row is wide. A thread keeps its elements in
// registers between passes, so each row is read and written once. A thread sums its own elements in
// ascending order, a warp its threads as a tree, a block its warps in ascending order: the order of
// the sum depends only on the number of columns.

#include "cuda/rows.hpp"
#include "cuda/warp.hpp"
#include "ops/norm.hpp"

namespace pympa::cuda {

namespace {

constexpr int kHeld = 4;  // groups of a thread in registers: 32 16-bit elements
constexpr unsigned kMostThreads = 512;

template <class T>
struct Norm {
  Rows<const T> x;
  const T *weight, *bias;
  Rows<T> out;
  Rows<const float> squares;  // sums over whole rows of `width` values; null if x has whole rows
  std::int64_t rows, columns, width;
  float offset, eps;
  bool whole;  // rows are aligned, and their groups full
};

// The sum over the threads of one row; every thread gets it, with the same bits.
__device__ __forceinline__ float row_sum(float value) {
  value = warp_sum(value);
  if (blockDim.x == kWarp) return value;
  struct Sums {
    float of_warp[kMostThreads / kWarp];
  };
  Sums& sums = block_shared<Sums>();
  __syncthreads();  // the sums of the pass before have been read
  if (threadIdx.x % kWarp == 0) sums.of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0F;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += sums.of_warp[warp];
  return total;
}

template <class T>
struct Row {
  static constexpr int kCount = kGroup<T>;
  const T* at;
  std::int64_t columns;
  Group<T> held[kHeld];

  static __device__ __forceinline__ std::int64_t column(int i) {
    return (std::int64_t{i} * blockDim.x + threadIdx.x) * kCount;
  }

  template <bool kWhole>
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (column(i) < columns) held[i] = read<kWhole>(at + column(i), columns - column(i));
    }
  }

  // Calls visit(group, column) for this thread's groups; those that are not held are read again.
  template <bool kWhole, class Visit>
  __device__ __forceinline__ void for_each(Visit&& visit) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (column(i) < columns) visit(held[i], column(i));
    }
    for (int i = kHeld; column(i) < columns; ++i) {
      visit(read<kWhole>(at + column(i), columns - column(i)), column(i));
    }
  }
};

template <bool kWhole, class T>
__device__ __forceinline__ float mean_of(Row<T>& row) {
  float sum = 0.0F;
  row.template for_each<kWhole>([&](const Group<T>& x, std::int64_t) {
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) sum += to_float(x.at[i]);
  });
  return row_sum(sum) / static_cast<float>(row.columns);
}

// The sum of (x - mean)^2.
template <bool kWhole, class T>
__device__ __forceinline__ float sum_of_squares(Row<T>& row, float mean) {
  float sum = 0.0F;
  row.template for_each<kWhole>([&](const Group<T>& x, std::int64_t column) {
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) {
      const bool inside = kWhole || column + i < row.columns;
      const float centred = inside ? to_float(x.at[i]) - mean : 0.0F;
      sum = fmaf(centred, centred, sum);
    }
  });
  return row_sum(sum);
}

// The kind, and whether a row's mean square comes from the sum over a row of which it is a part.
enum class Way { kLayer, kRms, kRmsOfPart };

template <bool kWhole, Way kWay, class T>
__device__ __forceinline__ void norm_row(const Norm<T>& args, std::int64_t at) {
  Row<T> row{args.x(at, 0), args.columns, {}};
  row.template hold<kWhole>();
  const float mean = kWay == Way::kLayer ? mean_of<kWhole>(row) : 0.0F;
  const float squares =
      kWay == Way::kRmsOfPart ? *args.squares(at, 0) : sum_of_squares<kWhole>(row, mean);
  const float inverse = 1.0F / sqrtf(squares / static_cast<float>(args.width) + args.eps);
  row.template for_each<kWhole>([&](const Group<T>& x, std::int64_t column) {
    const std::int64_t left = args.columns - column;
    float y[kGroup<T>], other[kGroup<T>];
    load<kWhole>(args.weight + column, left, other);
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) {
      y[i] = (to_float(x.at[i]) - mean) * inverse * (other[i] + args.offset);
    }
    if (args.bias) {
      load<kWhole>(args.bias + column, left, other);
#pragma unroll
      for (int i = 0; i < kGroup<T>; ++i) y[i] += other[i];
    }
    store<kWhole>(args.out(at, column), left, y);
  });
}

template <class T, Way kWay>
__global__ void __launch_bounds__(kMostThreads) norm_kernel(Norm<T> args) {
  const std::int64_t at = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (at >= args.rows) return;
  if (args.whole) {
    norm_row<true, kWay>(args, at);
  } else {
    norm_row<false, kWay>(args, at);
  }
}

template <bool kWhole, class T>
__device__ __forceinline__ void sum_row(Rows<const T> x, Rows<float> out, std::int64_t at,
                                        std::int64_t columns) {
  Row<T> row{x(at, 0), columns, {}};
  row.template hold<kWhole>();
  const float sum = sum_of_squares<kWhole>(row, 0.0F);
  if (threadIdx.x == 0) *out(at, 0) = sum;
}

template <class T>
__global__ void __launch_bounds__(kMostThreads)
    sum_squares_kernel(Rows<const T> x, Rows<float> out, std::int64_t rows, std::int64_t columns,
                       bool whole) {
  const std::int64_t at = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (at >= rows) return;
  whole ? sum_row<true>(x, out, at, columns) : sum_row<false>(x, out, at, columns);
}

// Where a row's threads are: one warp of a block of several rows, or a block.
struct RowThreads {
  dim3 grid, block;
};

template <class T>
RowThreads threads_of(std::int64_t rows, std::int64_t columns) {
  unsigned threads = kWarp;
  while (threads < kMostThreads && threads * kHeld * kGroup<T> < columns) threads *= 2;
  const unsigned of_block = threads == kWarp ? kRowsOfABlock : 1;
  return {dim3{static_cast<unsigned>(ceil_div(rows, of_block))}, dim3{threads, of_block}};
}

template <class T>
void norm_typed(const NormArgs& args) {
  Norm<T> norm{{static_cast<const T*>(args.x), args.x_stride},
               static_cast<const T*>(args.weight),
               static_cast<const T*>(args.bias),
               {static_cast<T*>(args.out), args.out_stride},
               {args.squares, args.squares_stride},
               args.rows,
               args.columns,
               args.width,
               args.offset,
               args.eps,
               false};
  norm.whole = args.columns % kGroup<T> == 0 && is_aligned(norm.x) && is_aligned(norm.out) &&
               is_aligned(Rows<const T>{norm.weight, 0}) && is_aligned(Rows<const T>{norm.bias, 0});
  const auto [grid, block] = threads_of<T>(args.rows, args.columns);
  const auto kernel = args.kind == NormKind::kLayer ? norm_kernel<T, Way::kLayer>
                      : args.squares                ? norm_kernel<T, Way::kRmsOfPart>
                                                    : norm_kernel<T, Way::kRms>;
  launch(kernel, grid, block, 0, args.on.stream, norm);
}

void norm_cuda(const NormArgs& args) {
  with_type(args.dtype, [&]<class T>() { norm_typed<T>(args); });
}

void sum_squares_cuda(const SumSquaresArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    const Rows<const T> x{static_cast<const T*>(args.x), args.x_stride};
    const auto [grid, block] = threads_of<T>(args.rows, args.columns);
    launch(sum_squares_kernel<T>, grid, block, 0, args.on.stream, x,
           Rows<float>{args.out, args.out_stride}, args.rows, args.columns,
           args.columns % kGroup<T> == 0 && is_aligned(x));
  });
}

}  // namespace

const NormKernels norm_kernels = {norm_cuda, sum_squares_cuda};

}  // namespace pympa::cuda
