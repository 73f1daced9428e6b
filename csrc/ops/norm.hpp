// RMS and layer normalisation of rows.
#pragma once

#include <cstdint>

#include "core/dispatch.hpp"

namespace pympa {

struct TensorView;

enum class NormKind { kRms, kLayer };

struct NormArgs {
  std::int64_t rows, columns;
  DType dtype;
  const void* x;
  std::int64_t x_stride;
  const void *weight, *bias;  // bias is null if none
  float eps;
  NormKind kind;
  void* out;
  std::int64_t out_stride;
  Execution on;
};

struct NormKernels {
  void (*norm)(const NormArgs& args);
};

PYMPA_DECLARE_FLOAT_KERNELS(NormKernels, norm_kernels)

void norm(const TensorView& x, const TensorView& weight, const TensorView* bias, double eps,
          NormKind kind, const TensorView& out, const Execution& on);

}  // namespace pympa
