// Rows by index: embedding lookup with a share of the vocabulary, and dispatch to experts.
#pragma once

#include <cstdint>

#include "core/dispatch.hpp"

namespace pympa {

struct TensorView;

struct GatherArgs {
  std::int64_t rows, row_bytes, source_rows, first_row;
  const void* source;
  std::int64_t source_stride_bytes;
  const std::int32_t* index;
  void* out;
  std::int64_t out_stride_bytes;
  Execution on;
};

struct GatherKernels {
  void (*gather_rows)(const GatherArgs& args);
};

PYMPA_DECLARE_FLOAT_KERNELS(GatherKernels, gather_kernels)

// out[r] = source[index[r] - first_row], zeros where that is no row of the source.
void gather_rows(const TensorView& source, const TensorView& index, const TensorView& out,
                 std::int64_t first_row, const Execution& on);

}  // namespace pympa
