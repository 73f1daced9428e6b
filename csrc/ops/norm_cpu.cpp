// Normalisation of rows [rows, columns] in float32, rounded once.
//
//   rms:   y = x / sqrt(mean(x^2) + eps) * weight + bias
//   layer: y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias    (two passes)

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

template <class T>
float mean_square(const T* x, int64_t columns, float mean) {
  V sums{};
  for (int64_t i = 0; i < columns; i += W) {
    V centred = load(x + i, columns - i) - splat(mean);
    // Lanes past the end hold -mean, not 0.
    if (columns - i < W) centred = lane_index() < static_cast<int>(columns - i) ? centred : V{};
    sums = fma(centred, centred, sums);
  }
  return sum_lanes(sums) / static_cast<float>(columns);
}

template <class T>
void norm_rows(const NormArgs& args, int64_t first, int64_t last) {
  const T* weight = static_cast<const T*>(args.weight);
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    const float mean = args.kind == NormKind::kLayer ? mean_of(x, args.columns) : 0.0f;
    const V deviation = sqrt(splat(mean_square(x, args.columns, mean) + args.eps));
    const V inverse = splat(1.0f) / deviation;
    for (int64_t i = 0; i < args.columns; i += W) {
      const int64_t count = args.columns - i;
      V y = (load(x + i, count) - splat(mean)) * inverse * load(weight + i, count);
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

}  // namespace

const NormKernels norm_kernels = {norm_cpu};

}  // namespace pympa::PYMPA_ISA
