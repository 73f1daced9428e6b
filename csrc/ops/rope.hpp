// Rotary position embedding, in place.
#pragma once

#include <cstdint>

#include "core/dispatch.hpp"

namespace pympa {

struct TensorView;

struct RopeArgs {
  std::int64_t rows, heads, half;
  DType dtype;
  void* x;
  std::int64_t x_row, x_head;  // strides
  const float *cos, *sin;
  std::int64_t cos_stride, sin_stride;
  const std::int32_t* index;
  bool interleaved;  // pairs (2i, 2i + 1), otherwise (i, i + half)
  Execution on;
};

struct RopeKernels {
  void (*rope)(const RopeArgs& args);
};

PYMPA_DECLARE_FLOAT_KERNELS(RopeKernels, rope_kernels)

void rope(const TensorView& x, const TensorView& cos, const TensorView& sin,
          const TensorView& index, bool interleaved, const Execution& on);

}  // namespace pympa
