// RMS and layer normalisation of rows, and the sums of squares that make the norm of a row whose
// parts lie on several ranks.
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
  float offset;               // of the weight
  float eps;
  NormKind kind;
  const float* squares;  // sums over whole rows; null if x has whole rows
  std::int64_t squares_stride, width;
  void* out;
  std::int64_t out_stride;
  Execution on;
};

struct SumSquaresArgs {
  std::int64_t rows, columns;
  DType dtype;
  const void* x;
  std::int64_t x_stride;
  float* out;
  std::int64_t out_stride;
  Execution on;
};

struct NormKernels {
  void (*norm)(const NormArgs& args);
  void (*sum_squares)(const SumSquaresArgs& args);
};

PYMPA_DECLARE_FLOAT_KERNELS(NormKernels, norm_kernels)

// Sums of squares float32 [rows, 1] over whole rows of `width` values, of which x has a part.
struct WholeRows {
  const TensorView* squares;  // null if x has whole rows
  std::int64_t width;
};

// The gain is weight + offset in float32.
void norm(const TensorView& x, const TensorView& weight, const TensorView* bias, double eps,
          NormKind kind, double offset, const WholeRows& whole, const TensorView& out,
          const Execution& on);

// out float32 [rows, 1]. Where x has whole rows, `norm` gives the same bits with and without them.
void sum_squares(const TensorView& x, const TensorView& out, const Execution& on);

}  // namespace pympa
