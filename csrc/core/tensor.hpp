// A non-owning view of an array, the argument type of every public op.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "core/dtype.hpp"

namespace pympa {

constexpr int kMaxRank = 4;

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kUInt8:
      return "uint8";
  }
  return "unknown";
}

// Strides count elements. The last dimension is contiguous (the binding checks it); the outer ones
// may be strided, so that a slice of a fused projection is an argument like any other.
struct TensorView {
  const char* name = "";
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> stride{};

  std::int64_t size() const {
    std::int64_t product = 1;
    for (int axis = 0; axis < rank; ++axis) product *= shape[axis];
    return product;
  }

  std::string shape_text() const {
    std::string text = "[";
    for (int axis = 0; axis < rank; ++axis) {
      if (axis > 0) text += ", ";
      text += std::to_string(shape[axis]);
    }
    return text + "]";
  }
};

}  // namespace pympa
