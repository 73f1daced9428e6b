#include "ops/copy.hpp"

#include "core/check.hpp"

namespace pympa {

namespace {

std::int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
      return 1;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kInt64:
      return 8;
  }
  return 0;
}

// Consecutive rows that are adjacent in both arrays become one.
CopyArgs rows_of(const TensorView& source, const TensorView& out, const Execution& on) {
  const std::int64_t bytes = bytes_of(source.dtype);
  CopyArgs args{{1, 1, 1}, bytes, source.data, {}, out.data, {}, on};
  std::size_t rows = args.shape.size();  // those from here on are in use
  for (int axis = source.rank - 1; axis >= 0; --axis) {
    const std::int64_t length = out.shape[axis];
    if (length == 1) continue;
    const bool is_repeated = source.shape[axis] == 1;
    const std::int64_t from = is_repeated ? 0 : source.stride[axis] * bytes;
    const std::int64_t to = out.stride[axis] * bytes;
    const bool is_first = rows == args.shape.size();
    const std::int64_t whole = is_first ? args.row_bytes : args.shape[rows];
    const std::int64_t next_from = is_first ? whole : whole * args.source_stride[rows];
    const std::int64_t next_to = is_first ? whole : whole * args.out_stride[rows];
    if (from == next_from && to == next_to) {
      (is_first ? args.row_bytes : args.shape[rows]) *= length;
      continue;
    }
    --rows;
    args.shape[rows] = length;
    args.source_stride[rows] = from;
    args.out_stride[rows] = to;
  }
  return args;
}

}  // namespace

void copy(const TensorView& source, const TensorView& out, const Execution& on) {
  const char* op = "copy";
  check_dtype(op, out, source.dtype);
  bool fits = source.rank == out.rank;
  for (int axis = 0; axis < source.rank; ++axis) {
    fits = fits && (source.shape[axis] == out.shape[axis] || source.shape[axis] == 1);
  }
  if (!fits) fail(op, out.name, "shape " + source.shape_text(), out.shape_text());
  if (out.size() == 0) return;
  PYMPA_SELECT_KERNELS(on.isa, copy_kernels).copy(rows_of(source, out, on));
}

}  // namespace pympa
