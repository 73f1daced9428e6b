#include "bindings/array.hpp"

#include <pybind11/gil_safe_call_once.h>

#include "core/check.hpp"

namespace pympa::bindings {

namespace {

const py::dtype& bfloat16() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::dtype> storage;
  return storage
      .call_once_and_store_result(
          [] { return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16")); })
      .get_stored();
}

DType dtype_of(const char* op, const char* name, const py::dtype& dtype) {
  const int number = dtype.num();
  if (number == bfloat16().num()) return DType::kBFloat16;
  if (number == py::dtype::num_of<float>()) return DType::kFloat32;
  if (number == py::dtype("e").num()) return DType::kFloat16;
  if (number == py::dtype::num_of<std::int32_t>()) return DType::kInt32;
  if (number == py::dtype::num_of<std::int64_t>()) return DType::kInt64;
  if (number == py::dtype::num_of<std::uint8_t>()) return DType::kUInt8;
  fail(op, name, "dtype float32, float16, bfloat16, int32, int64 or uint8", py::str(dtype));
}

}  // namespace

TensorView input(const char* op, const char* name, const py::array& array) {
  TensorView view;
  view.name = name;
  view.data = const_cast<void*>(array.data());
  view.dtype = dtype_of(op, name, array.dtype());
  view.rank = static_cast<int>(array.ndim());
  if (view.rank > kMaxRank) {
    fail(op, name, "at most " + std::to_string(kMaxRank) + " dimensions",
         std::to_string(view.rank));
  }
  for (int axis = 0; axis < view.rank; ++axis) {
    const py::ssize_t bytes = array.strides(axis);
    view.shape[axis] = array.shape(axis);
    view.stride[axis] = bytes / array.itemsize();
    if (bytes % array.itemsize() != 0 && view.shape[axis] > 1) {
      fail(op, name, "strides in whole elements", std::to_string(bytes) + " bytes");
    }
  }
  const int last = view.rank - 1;
  // NumPy gives the strides of an empty array no meaning.
  if (view.size() > 0 && last >= 0 && view.shape[last] > 1 && view.stride[last] != 1) {
    fail(op, name, "a contiguous last dimension",
         "stride " + std::to_string(view.stride[last]) + " elements");
  }
  return view;
}

TensorView output(const char* op, const char* name, const py::array& array) {
  if (!array.writeable()) fail(op, name, "a writeable array", "a read-only one");
  return input(op, name, array);
}

OptionalView::OptionalView(const char* op, const char* name, const std::optional<py::array>& array,
                           bool writeable) {
  if (array) view_ = writeable ? output(op, name, *array) : input(op, name, *array);
}

}  // namespace pympa::bindings
