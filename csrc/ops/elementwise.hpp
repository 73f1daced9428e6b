// Sums of arrays: a residual, and the partial sums of the ranks of one tensor-parallel group. And
// the cap on logits.
#pragma once

#include <cstdint>

#include "core/dispatch.hpp"

namespace pympa {

struct TensorView;

struct SumArgs {
  std::int64_t parts, rows, columns;
  DType dtype;
  const void* x;  // part p, row r at x + p * part_stride + r * row_stride
  std::int64_t part_stride, row_stride;
  const void* bias;  // null if none
  void* out;
  std::int64_t out_stride;
  Execution on;
};

struct AddArgs {
  std::int64_t rows, columns;
  DType dtype;
  const void *a, *b;
  std::int64_t a_stride, b_stride;
  void* out;
  std::int64_t out_stride;
  Execution on;
};

struct SoftcapArgs {
  std::int64_t rows, columns;
  float* x;
  std::int64_t stride;
  float cap;
  Execution on;
};

struct ElementwiseKernels {
  void (*add)(const AddArgs& args);
  void (*sum_partials)(const SumArgs& args);
  void (*softcap)(const SoftcapArgs& args);
};

PYMPA_DECLARE_FLOAT_KERNELS(ElementwiseKernels, elementwise_kernels)

// out = round(a + b) on [rows, columns]; out may be a or b.
void add(const TensorView& a, const TensorView& b, const TensorView& out, const Execution& on);

// out = round(parts[0] + parts[1] + ... + bias), float32, in that order.
void sum_partials(const TensorView& parts, const TensorView* bias, const TensorView& out,
                  const Execution& on);

// x = cap tanh(x / cap), float32 [rows, columns], in place.
void softcap(const TensorView& x, double cap, const Execution& on);

}  // namespace pympa
