// Mixture of experts without its linears: sorting rows by the experts that they have chosen, and
// combining what these return.
#pragma once

#include <cstdint>

#include "core/dispatch.hpp"

namespace pympa {

struct TensorView;

struct CombineArgs {
  std::int64_t rows, columns, chosen;
  DType dtype;
  const void* x;  // the experts' outputs
  std::int64_t x_stride;
  const std::int32_t* inverse;
  std::int64_t inverse_stride;
  const float* weights;
  std::int64_t weights_stride;
  const void* base;  // null if none
  std::int64_t base_stride;
  const float* base_gate;  // float32 [rows, 1], null if none
  std::int64_t base_gate_stride;
  void* out;
  std::int64_t out_stride;
  Execution on;
};

// Choices of experts, int32 [rows, chosen]; an expert of -1 has dropped the row.
struct SortArgs {
  std::int64_t rows, chosen, experts;
  const std::int32_t* ids;
  std::int64_t ids_stride;
  std::int64_t* counts;   // on the host
  std::int32_t* sources;  // [rows * chosen]
  std::int32_t* inverse;
  std::int64_t inverse_stride;
  Execution on;
};

struct SegmentArgs {
  std::int64_t rows, chosen, experts, segments;
  std::int32_t* ids;
  std::int64_t ids_stride;
  // On the host: how many consecutive rows each segment has, and for each of its experts a count.
  const std::int64_t* segment_rows;
  std::int64_t* counts;
  std::int64_t counts_stride;
  const std::int64_t* capacity;  // of each segment's experts; null where nothing is dropped
  Execution on;
};

struct ExpertKernels {
  void (*combine_rows)(const CombineArgs& args);
};

struct RoutingKernels {
  void (*sort_rows)(const SortArgs& args);
  void (*count_experts)(const SegmentArgs& args);
  void (*drop_overflow)(const SegmentArgs& args);
};

PYMPA_DECLARE_FLOAT_KERNELS(ExpertKernels, expert_kernels)
PYMPA_DECLARE_FLOAT_KERNELS(RoutingKernels, routing_kernels)

// Below, an expert of -1 has dropped the row, and a segment is a number of consecutive rows.

// Stable counting sort of all (row, choice) pairs by expert.
void sort_rows(const TensorView& experts, const TensorView& counts, const TensorView& sources,
               const TensorView& inverse, const Execution& on);

// Pairs of each segment that go to each expert.
void count_experts(const TensorView& experts, const TensorView& segment_rows,
                   const TensorView& counts, const Execution& on);

// Drops, in row order, what a segment sends to an expert beyond the segment's capacity.
void drop_overflow(const TensorView& experts, const TensorView& segment_rows,
                   const TensorView& used, const TensorView& capacity, const Execution& on);

// out[r] = round(sum of weights[r, c] * rows[inverse[r, c]] over ascending c, + base[r]), where
// base[r] is multiplied by the sigmoid of base_gate[r] if there is one.
void combine_rows(const TensorView& rows, const TensorView& inverse, const TensorView& weights,
                  const TensorView* base, const TensorView* base_gate, const TensorView& out,
                  const Execution& on);

}  // namespace pympa
