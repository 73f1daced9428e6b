#include "core/check.hpp"

#include <sstream>
#include <stdexcept>

#include "core/dispatch.hpp"

namespace pympa {

namespace {

void check_bytes(const char* op, const TensorView& view, std::int64_t bytes) {
  const std::int64_t length = view.shape[view.rank - 1];
  if (length < bytes) {
    fail(op, view.name, "at least " + std::to_string(bytes) + " bytes",
         std::to_string(length) + " bytes");
  }
}

[[noreturn]] void fail_range(const char* op, const char* argument, const char* what, double value,
                             double least, double most) {
  std::ostringstream expected, got;
  expected << what << " from " << least << " to " << most;
  got << value;
  fail(op, argument, expected.str(), got.str());
}

}  // namespace

void fail(const char* op, const std::string& argument, const std::string& expected,
          const std::string& got) {
  throw std::invalid_argument(std::string(op) + ": " + argument + ": expected " + expected +
                              ", got " + got);
}

void check_float_dtype(const char* op, const TensorView& view) {
  if (view.dtype != DType::kFloat32 && view.dtype != DType::kFloat16 &&
      view.dtype != DType::kBFloat16) {
    fail(op, view.name, "dtype float32, float16 or bfloat16", dtype_name(view.dtype));
  }
}

DType parse_float_dtype(const char* op, const std::string& name) {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  fail(op, "dtype", "float32, float16 or bfloat16", "'" + name + "'");
}

void check_dtype(const char* op, const TensorView& view, DType expected) {
  if (view.dtype != expected) {
    fail(op, view.name, std::string("dtype ") + dtype_name(expected), dtype_name(view.dtype));
  }
}

void check_shape(const char* op, const TensorView& view,
                 std::initializer_list<std::int64_t> expected) {
  bool same = view.rank == static_cast<int>(expected.size());
  int axis = 0;
  std::string text = "[";
  for (std::int64_t length : expected) {
    if (axis > 0) text += ", ";
    text += length < 0 ? "any" : std::to_string(length);
    same = same && (length < 0 || view.shape[axis] == length);
    ++axis;
  }
  if (!same) fail(op, view.name, "shape " + text + "]", view.shape_text());
}

void check_at_least(const char* op, const char* argument, std::int64_t value, std::int64_t least) {
  if (value < least) fail(op, argument, "at least " + std::to_string(least), std::to_string(value));
}

float check_range(const char* op, const char* argument, double value, double least, double most) {
  if (!(value >= least && value <= most)) fail_range(op, argument, "a number", value, least, most);
  return static_cast<float>(value);
}

float check_float(const char* op, const char* argument, double value, double least, double most) {
  if (value != 0.0 && !(value >= least && value <= most)) {
    fail_range(op, argument, "0 or a number", value, least, most);
  }
  return static_cast<float>(value);
}

void check_entries(const char* op, const TensorView& view, std::int64_t least, std::int64_t limit) {
  check_dtype(op, view, DType::kInt32);
  if (!kReadsKernelArrays) return;
  const std::int64_t columns = view.rank == 1 ? 1 : view.shape[1];
  for (std::int64_t row = 0; row < view.shape[0]; ++row) {
    const std::int32_t* entries =
        static_cast<const std::int32_t*>(view.data) + row * view.stride[0];
    for (std::int64_t i = 0; i < columns; ++i) {
      if (entries[i] < least || entries[i] >= limit) {
        fail(op, view.name,
             "entries in [" + std::to_string(least) + ", " + std::to_string(limit) + ")",
             std::to_string(entries[i]) + " in row " + std::to_string(row));
      }
    }
  }
}

void check_row_counts(const char* op, const TensorView& counts, std::int64_t rows) {
  check_dtype(op, counts, DType::kInt64);
  check_shape(op, counts, {-1});
  const std::int64_t* items = static_cast<const std::int64_t*>(counts.data);
  std::int64_t left = rows;  // counted down to below 0 at most once, where a sum could overflow
  for (std::int64_t i = 0; i < counts.shape[0] && left >= 0; ++i) {
    check_at_least(op, counts.name, items[i], 0);
    left -= items[i];
  }
  if (left != 0) {
    fail(op, counts.name, "counts that add up to " + std::to_string(rows) + " rows",
         left > 0 ? std::to_string(left) + " too few" : std::to_string(-left) + " too many");
  }
}

void check_buffer(const char* op, const TensorView& view, std::int64_t bytes) {
  check_dtype(op, view, DType::kUInt8);
  check_shape(op, view, {-1});
  check_bytes(op, view, bytes);
}

void check_buffers(const char* op, const TensorView& view, std::int64_t count, std::int64_t bytes) {
  check_dtype(op, view, DType::kUInt8);
  check_shape(op, view, {count, -1});
  check_bytes(op, view, bytes);
}

}  // namespace pympa
