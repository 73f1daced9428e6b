#include "ops/experts.hpp"

#include <limits>

#include "core/check.hpp"

namespace pympa {

namespace {

// Checks choices [rows, chosen] and counts [segments, experts], and fills in their sizes.
SegmentArgs segment_args(const char* op, const TensorView& experts, const TensorView& segment_rows,
                         const TensorView& counts, const Execution& on) {
  check_dtype(op, counts, DType::kInt64);
  check_shape(op, counts, {segment_rows.shape[0], -1});
  check_shape(op, experts, {-1, -1});
  check_entries(op, experts, -1, counts.shape[1]);
  check_row_counts(op, segment_rows, experts.shape[0]);
  return {experts.shape[0],
          experts.shape[1],
          counts.shape[1],
          counts.shape[0],
          static_cast<std::int32_t*>(experts.data),
          experts.stride[0],
          static_cast<const std::int64_t*>(segment_rows.data),
          static_cast<std::int64_t*>(counts.data),
          counts.stride[0],
          nullptr,
          on};
}

}  // namespace

void sort_rows(const TensorView& experts, const TensorView& counts, const TensorView& sources,
               const TensorView& inverse, const Execution& on) {
  const char* op = "sort_rows";
  check_dtype(op, counts, DType::kInt64);
  check_shape(op, counts, {-1});
  check_shape(op, experts, {-1, -1});
  check_entries(op, experts, -1, counts.shape[0]);
  const std::int64_t rows = experts.shape[0], chosen = experts.shape[1], pairs = experts.size();
  if (pairs > std::numeric_limits<std::int32_t>::max()) {
    fail(op, experts.name, "fewer than 2^31 entries", std::to_string(pairs));
  }
  check_dtype(op, sources, DType::kInt32);
  check_shape(op, sources, {pairs});
  check_dtype(op, inverse, DType::kInt32);
  check_shape(op, inverse, {rows, chosen});
  const SortArgs args{rows,
                      chosen,
                      counts.shape[0],
                      static_cast<const std::int32_t*>(experts.data),
                      experts.stride[0],
                      static_cast<std::int64_t*>(counts.data),
                      static_cast<std::int32_t*>(sources.data),
                      static_cast<std::int32_t*>(inverse.data),
                      inverse.stride[0],
                      on};
  PYMPA_SELECT_KERNELS(on.isa, routing_kernels).sort_rows(args);
}

void count_experts(const TensorView& experts, const TensorView& segment_rows,
                   const TensorView& counts, const Execution& on) {
  const SegmentArgs args = segment_args("count_experts", experts, segment_rows, counts, on);
  PYMPA_SELECT_KERNELS(on.isa, routing_kernels).count_experts(args);
}

void drop_overflow(const TensorView& experts, const TensorView& segment_rows,
                   const TensorView& used, const TensorView& capacity, const Execution& on) {
  const char* op = "drop_overflow";
  SegmentArgs args = segment_args(op, experts, segment_rows, used, on);
  check_dtype(op, capacity, DType::kInt64);
  check_shape(op, capacity, {segment_rows.shape[0]});
  args.capacity = static_cast<const std::int64_t*>(capacity.data);
  PYMPA_SELECT_KERNELS(on.isa, routing_kernels).drop_overflow(args);
}

void combine_rows(const TensorView& rows, const TensorView& inverse, const TensorView& weights,
                  const TensorView* base, const TensorView* base_gate, const TensorView& out,
                  const Execution& on) {
  const char* op = "combine_rows";
  check_float_dtype(op, rows);
  check_shape(op, rows, {-1, -1});
  check_shape(op, inverse, {-1, -1});
  check_entries(op, inverse, -1, rows.shape[0]);
  check_dtype(op, weights, DType::kFloat32);
  check_shape(op, weights, {inverse.shape[0], inverse.shape[1]});
  for (const TensorView* view : {base, &out}) {
    if (!view) continue;
    check_dtype(op, *view, rows.dtype);
    check_shape(op, *view, {inverse.shape[0], rows.shape[1]});
  }
  if (base_gate) {
    if (!base) fail(op, base_gate->name, "None without base", "an array");
    check_dtype(op, *base_gate, DType::kFloat32);
    check_shape(op, *base_gate, {inverse.shape[0], 1});
  }
  const CombineArgs args{inverse.shape[0],
                         rows.shape[1],
                         inverse.shape[1],
                         rows.dtype,
                         rows.data,
                         rows.stride[0],
                         static_cast<const std::int32_t*>(inverse.data),
                         inverse.stride[0],
                         static_cast<const float*>(weights.data),
                         weights.stride[0],
                         base ? base->data : nullptr,
                         base ? base->stride[0] : 0,
                         base_gate ? static_cast<const float*>(base_gate->data) : nullptr,
                         base_gate ? base_gate->stride[0] : 0,
                         out.data,
                         out.stride[0],
                         on};
  PYMPA_SELECT_KERNELS(on.isa, expert_kernels).combine_rows(args);
}

}  // namespace pympa
