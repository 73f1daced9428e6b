// Normalisation of rows [rows, columns] in float32, rounded once; gain = weight + offset.
//
//   rms:   y = x / sqrt(mean(x^2) + eps) * gain + bias
//   layer: y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * gain + bias    (two passes)
//
// sum_squares: sums x^2 [rows, 1], from which rms has mean(x^2) where x is a part of its rows.

#include "cpu/convert.hpp"
#include "cpu/parallel.hpp"
#include "ops/norm.hpp"

namespace pympa::PYMPA_ISA {

namespace {

template <class T>
float mean_of(const T* x, int64_t columns) {
  V sums{};
  for (int64_t i = 0; i < columns; i += W) sums += load(x + i, columns - i);
  return sum_lanes(sums) / static_cast<float>(columns);
}

// The sum of (x - mean)^2: of blocks, so that few numbers are added to a large one.
template <class T>
float sum_of_squares(const T* x, int64_t columns, float mean) {
  constexpr int64_t kBlock = 512;
  V total{};
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t last = min_of(first + kBlock, columns);
    V sums{};
    for (int64_t i = first; i < last; i += W) {
      V centred = load(x + i, last - i) - splat(mean);
      // Lanes past the end hold -mean, not 0.
      if (last - i < W) centred = lane_index() < static_cast<int>(last - i) ? centred : V{};
      sums = fma(centred, centred, sums);
    }
    total += sums;
  }
  return sum_lanes(total);
}

template <class T>
void norm_rows(const NormArgs& args, int64_t first, int64_t last) {
  const T* weight = static_cast<const T*>(args.weight);
  const T* bias = static_cast<const T*>(args.bias);
  const V offset = splat(args.offset);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    const float mean = args.kind == NormKind::kLayer ? mean_of(x, args.columns) : 0.0f;
    const float squares = args.squares ? args.squares[row * args.squares_stride]
                                       : sum_of_squares(x, args.columns, mean);
    const V deviation = sqrt(splat(squares / static_cast<float>(args.width) + args.eps));
    const V inverse = splat(1.0f) / deviation;
    for (int64_t i = 0; i < args.columns; i += W) {
      const int64_t count = args.columns - i;
      const V gain = load(weight + i, count) + offset;
      V y = (load(x + i, count) - splat(mean)) * inverse * gain;
      if (bias) y += load(bias + i, count);
      store(out + i, y, count);
    }
  }
}

void norm_cpu(const NormArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    for_row_pieces(args.on.threads, args.rows,
                   [&](int64_t first, int64_t last) { norm_rows<T>(args, first, last); });
  });
}

void sum_squares_cpu(const SumSquaresArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    for_row_pieces(args.on.threads, args.rows, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
        args.out[row * args.out_stride] = sum_of_squares(x, args.columns, 0.0f);
      }
    });
  });
}

}  // namespace

const NormKernels norm_kernels = {norm_cpu, sum_squares_cpu};

}  // namespace pympa::PYMPA_ISA
