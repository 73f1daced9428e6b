// Argument checks. Each failure names the op and the argument, what was expected and what was
// given.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/tensor.hpp"

namespace pympa {

// Throws std::invalid_argument "op: argument: expected ..., got ...".
[[noreturn]] void fail(const char* op, const std::string& argument, const std::string& expected,
                       const std::string& got);

// The dtypes a model may compute in.
void check_float_dtype(const char* op, const TensorView& view);
DType parse_float_dtype(const char* op, const std::string& name);

void check_dtype(const char* op, const TensorView& view, DType expected);

// An entry of -1 accepts any length.
void check_shape(const char* op, const TensorView& view,
                 std::initializer_list<std::int64_t> expected);

void check_at_least(const char* op, const char* argument, std::int64_t value, std::int64_t least);

constexpr double kLeastNormal =
    0x1p-126;                         // of float32; it holds smaller numbers badly or not at all
constexpr double kMostFactor = 1e30;  // larger factors overflow float32 soon

// float32 holds a softcap in these bounds and its reciprocal; a larger one changes no score
// below 40.
constexpr double kLeastSoftcap = kLeastNormal, kMostSoftcap = 1e5;

// `value` as the float32 that kernels get: from `least` to `most`.
float check_range(const char* op, const char* argument, double value, double least, double most);

// The same, or 0.
float check_float(const char* op, const char* argument, double value, double least, double most);

// int32 [any] or [any, any], entries in [least, limit) where the host can read them.
void check_entries(const char* op, const TensorView& view, std::int64_t least, std::int64_t limit);

// int64 [any], none negative, adding up to `rows`.
void check_row_counts(const char* op, const TensorView& counts, std::int64_t rows);

// A flat uint8 buffer of at least `bytes` bytes.
void check_buffer(const char* op, const TensorView& view, std::int64_t bytes);

// uint8 [count, at least `bytes`].
void check_buffers(const char* op, const TensorView& view, std::int64_t count, std::int64_t bytes);

}  // namespace pympa
