// Copies between arrays of one dtype with strided rows.
#pragma once

#include <array>
#include <cstdint>

#include "core/dispatch.hpp"
#include "core/tensor.hpp"

namespace pympa {

struct CopyArgs {
  std::array<std::int64_t, kMaxRank - 1> shape;  // of rows; the last dimension varies fastest
  std::int64_t row_bytes;
  const void* source;
  std::array<std::int64_t, kMaxRank - 1> source_stride;  // bytes
  void* out;
  std::array<std::int64_t, kMaxRank - 1> out_stride;
  Execution on;
};

struct CopyKernels {
  void (*copy)(const CopyArgs& args);
};

PYMPA_DECLARE_KERNELS(CopyKernels, copy_kernels)

// out = source, which do not overlap. An axis of length 1 of source is repeated.
void copy(const TensorView& source, const TensorView& out, const Execution& on);

}  // namespace pympa
