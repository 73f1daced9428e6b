#include "ops/experts.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "core/check.hpp"

namespace pympa {

namespace {

using Count = std::int64_t;

template <class T>
T* row_of(const TensorView& view, std::int64_t row) {
  return static_cast<T*>(view.data) + row * view.stride[0];
}

// int32 [rows, choices], entries in [-1, limit).
void check_entries(const char* op, const TensorView& view, std::int64_t limit) {
  check_dtype(op, view, DType::kInt32);
  check_shape(op, view, {-1, -1});
  for (std::int64_t row = 0; row < view.shape[0]; ++row) {
    const std::int32_t* entries = row_of<std::int32_t>(view, row);
    for (std::int64_t i = 0; i < view.shape[1]; ++i) {
      if (entries[i] < -1 || entries[i] >= limit) {
        fail(op, view.name, "entries in [-1, " + std::to_string(limit) + ")",
             std::to_string(entries[i]) + " in row " + std::to_string(row));
      }
    }
  }
}

// int64 [segments, experts] beside the experts of the segments' rows.
void check_segments(const char* op, const TensorView& experts, const TensorView& segment_rows,
                    const TensorView& counts) {
  check_dtype(op, counts, DType::kInt64);
  check_shape(op, counts, {segment_rows.shape[0], -1});
  check_entries(op, experts, counts.shape[1]);
  check_row_counts(op, segment_rows, experts.shape[0]);
}

// Calls visit(segment, id) for each choice that is not dropped, row by row.
template <class Visit>
void for_each_choice(const TensorView& experts, const TensorView& segment_rows, Visit&& visit) {
  const Count* lengths = static_cast<const Count*>(segment_rows.data);
  std::int64_t row = 0;
  for (std::int64_t segment = 0; segment < segment_rows.shape[0]; ++segment) {
    for (const std::int64_t last = row + lengths[segment]; row < last; ++row) {
      std::int32_t* ids = row_of<std::int32_t>(experts, row);
      for (std::int64_t i = 0; i < experts.shape[1]; ++i) {
        if (ids[i] >= 0) visit(segment, ids[i]);
      }
    }
  }
}

}  // namespace

std::int64_t select_experts(const TensorView& logits, const TensorView& experts,
                            const TensorView& weights, bool renormalize, int threads, Isa isa) {
  const char* op = "select_experts";
  check_dtype(op, logits, DType::kFloat32);
  check_shape(op, logits, {-1, -1});
  check_dtype(op, experts, DType::kInt32);
  check_shape(op, experts, {logits.shape[0], -1});
  const std::int64_t chosen = experts.shape[1];
  if (chosen < 1 || chosen > logits.shape[1]) {
    fail(op, experts.name, "1 to " + std::to_string(logits.shape[1]) + " columns",
         std::to_string(chosen));
  }
  check_dtype(op, weights, DType::kFloat32);
  check_shape(op, weights, {logits.shape[0], chosen});
  check_at_least(op, "threads", threads, 1);
  const SelectArgs args{logits.shape[0],
                        logits.shape[1],
                        chosen,
                        static_cast<const float*>(logits.data),
                        logits.stride[0],
                        static_cast<std::int32_t*>(experts.data),
                        experts.stride[0],
                        static_cast<float*>(weights.data),
                        weights.stride[0],
                        renormalize,
                        threads};
  return PYMPA_SELECT_KERNELS(isa, expert_kernels).select_experts(args);
}

void sort_rows(const TensorView& experts, const TensorView& counts, const TensorView& sources,
               const TensorView& places) {
  const char* op = "sort_rows";
  check_dtype(op, counts, DType::kInt64);
  check_shape(op, counts, {-1});
  check_entries(op, experts, counts.shape[0]);
  const std::int64_t rows = experts.shape[0], choices = experts.shape[1], pairs = experts.size();
  if (pairs > std::numeric_limits<std::int32_t>::max()) {
    fail(op, experts.name, "fewer than 2^31 entries", std::to_string(pairs));
  }
  check_dtype(op, sources, DType::kInt32);
  check_shape(op, sources, {pairs});
  check_dtype(op, places, DType::kInt32);
  check_shape(op, places, {rows, choices});

  Count* next = static_cast<Count*>(counts.data);
  std::fill_n(next, counts.shape[0], 0);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int32_t* ids = row_of<std::int32_t>(experts, row);
    for (std::int64_t i = 0; i < choices; ++i) {
      if (ids[i] >= 0) ++next[ids[i]];
    }
  }
  // From here on, the place of each expert's next row.
  Count start = 0;
  for (std::int64_t e = 0; e < counts.shape[0]; ++e) start += std::exchange(next[e], start);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int32_t* ids = row_of<std::int32_t>(experts, row);
    std::int32_t* row_places = row_of<std::int32_t>(places, row);
    for (std::int64_t i = 0; i < choices; ++i) {
      row_places[i] = ids[i] < 0 ? -1 : static_cast<std::int32_t>(next[ids[i]]++);
      if (ids[i] >= 0) static_cast<std::int32_t*>(sources.data)[row_places[i]] = row;
    }
  }
  // Each expert's rows now end where those of the next one start.
  std::adjacent_difference(next, next + counts.shape[0], next);
}

void count_experts(const TensorView& experts, const TensorView& segment_rows,
                   const TensorView& counts) {
  check_segments("count_experts", experts, segment_rows, counts);
  for (std::int64_t segment = 0; segment < counts.shape[0]; ++segment) {
    std::fill_n(row_of<Count>(counts, segment), counts.shape[1], 0);
  }
  for_each_choice(experts, segment_rows, [&](std::int64_t segment, std::int32_t& id) {
    ++row_of<Count>(counts, segment)[id];
  });
}

void drop_overflow(const TensorView& experts, const TensorView& segment_rows,
                   const TensorView& used, const TensorView& capacity) {
  const char* op = "drop_overflow";
  check_segments(op, experts, segment_rows, used);
  check_dtype(op, capacity, DType::kInt64);
  check_shape(op, capacity, {segment_rows.shape[0]});
  const Count* capacities = static_cast<const Count*>(capacity.data);
  for_each_choice(experts, segment_rows, [&](std::int64_t segment, std::int32_t& id) {
    Count& taken = row_of<Count>(used, segment)[id];
    if (taken < capacities[segment]) {
      ++taken;
    } else {
      id = -1;
    }
  });
}

void combine_rows(const TensorView& rows, const TensorView& places, const TensorView& weights,
                  const TensorView* base, const TensorView& out, int threads, Isa isa) {
  const char* op = "combine_rows";
  check_float_dtype(op, rows);
  check_shape(op, rows, {-1, -1});
  check_entries(op, places, rows.shape[0]);
  check_dtype(op, weights, DType::kFloat32);
  check_shape(op, weights, {places.shape[0], places.shape[1]});
  for (const TensorView* view : {base, &out}) {
    if (!view) continue;
    check_dtype(op, *view, rows.dtype);
    check_shape(op, *view, {places.shape[0], rows.shape[1]});
  }
  check_at_least(op, "threads", threads, 1);
  const CombineArgs args{places.shape[0],
                         rows.shape[1],
                         places.shape[1],
                         rows.dtype,
                         rows.data,
                         rows.stride[0],
                         static_cast<const std::int32_t*>(places.data),
                         places.stride[0],
                         static_cast<const float*>(weights.data),
                         weights.stride[0],
                         base ? base->data : nullptr,
                         base ? base->stride[0] : 0,
                         out.data,
                         out.stride[0],
                         threads};
  PYMPA_SELECT_KERNELS(isa, expert_kernels).combine_rows(args);
}

}  // namespace pympa
