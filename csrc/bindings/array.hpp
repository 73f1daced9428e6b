// NumPy arrays as TensorViews: the only file that knows NumPy, ml_dtypes and pybind11 arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>

#include "core/tensor.hpp"

namespace pympa::bindings {

namespace py = pybind11;

// A view to read. Throws std::invalid_argument for a dtype that no kernel knows, more dimensions
// than kMaxRank, or a last dimension that is not contiguous.
TensorView input(const char* op, const char* name, const py::array& array);

// A view to write: read-only arrays are refused.
TensorView output(const char* op, const char* name, const py::array& array);

// A view of an optional array, and the pointer (null if None) that ops take.
class OptionalView {
 public:
  OptionalView(const char* op, const char* name, const std::optional<py::array>& array,
               bool writeable = false);
  const TensorView* get() const { return view_ ? &*view_ : nullptr; }

 private:
  std::optional<TensorView> view_;
};

}  // namespace pympa::bindings
