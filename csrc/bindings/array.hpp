// Conversion of arrays to TensorViews: the only files that use NumPy, CuPy, ml_dtypes and pybind11
// arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "core/tensor.hpp"

namespace pympa::bindings {

namespace py = pybind11;

// What kernels compute on: CuPy arrays in the module of CUDA kernels, NumPy arrays in all others.
#if defined(PYMPA_CUDA_KERNELS) && !defined(PYMPA_CUDA_EMULATED)
using Array = py::object;
#else
using Array = py::array;
#endif

using Optional = std::optional<Array>;
using HostOptional = std::optional<py::array>;

// A view to read. Throws std::invalid_argument for an array of another kind, a dtype that no kernel
// knows, more dimensions than kMaxRank, or a last dimension that is not contiguous.
TensorView input(const char* op, const char* name, const Array& array);

// A view to write: read-only arrays are refused.
TensorView output(const char* op, const char* name, const Array& array);

// The same for arguments that are NumPy arrays whatever kernels compute on.
TensorView host_input(const char* op, const char* name, const py::array& array);
TensorView host_output(const char* op, const char* name, const py::array& array);

// A view of an optional array, and the pointer (null if None) that ops take.
class OptionalView {
 public:
  OptionalView() = default;
  OptionalView(const char* op, const char* name, const Optional& array);
  static OptionalView writeable(const char* op, const char* name, const Optional& array);
  static OptionalView host(const char* op, const char* name, const HostOptional& array);
  const TensorView* get() const { return view_ ? &*view_ : nullptr; }

 private:
  std::optional<TensorView> view_;
};

}  // namespace pympa::bindings
