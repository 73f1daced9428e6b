#include "bindings/array.hpp"

#include <pybind11/gil_safe_call_once.h>

#include <algorithm>
#include <vector>

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

// Fills in the fields that are the same for all kinds of arrays; strides are in bytes. If an axis
// has one element, its stride may have any value (x[None] has 0). A stride that is too small for
// the memory of one index is set to that size. A larger one shows the alignment of the parent
// array.
TensorView strided_view(const char* op, const char* name, void* data, const py::dtype& dtype,
                        std::size_t rank, const py::ssize_t* shape, const py::ssize_t* bytes) {
  TensorView view;
  view.name = name;
  view.data = data;
  view.dtype = dtype_of(op, name, dtype);
  if (rank > kMaxRank) {
    fail(op, name, "at most " + std::to_string(kMaxRank) + " dimensions", std::to_string(rank));
  }
  view.rank = static_cast<int>(rank);
  const py::ssize_t itemsize = dtype.itemsize();
  const int last = view.rank - 1;
  for (int axis = last; axis >= 0; --axis) {
    view.shape[axis] = shape[axis];
    view.stride[axis] = bytes[axis] / itemsize;
    if (view.shape[axis] == 1) {
      const std::int64_t least = axis == last ? 1 : view.shape[axis + 1] * view.stride[axis + 1];
      view.stride[axis] = std::max(view.stride[axis], least);
    }
    if (bytes[axis] % itemsize != 0 && view.shape[axis] > 1) {
      fail(op, name, "strides in whole elements", std::to_string(bytes[axis]) + " bytes");
    }
  }
  // NumPy gives the strides of an empty array no meaning.
  if (view.size() > 0 && last >= 0 && view.shape[last] > 1 && view.stride[last] != 1) {
    fail(op, name, "a contiguous last dimension",
         "stride " + std::to_string(view.stride[last]) + " elements");
  }
  return view;
}

}  // namespace

TensorView host_input(const char* op, const char* name, const py::array& array) {
  return strided_view(op, name, const_cast<void*>(array.data()), array.dtype(),
                      static_cast<std::size_t>(array.ndim()), array.shape(), array.strides());
}

TensorView host_output(const char* op, const char* name, const py::array& array) {
  if (!array.writeable()) fail(op, name, "a writeable array", "a read-only one");
  return host_input(op, name, array);
}

#if defined(PYMPA_CUDA_KERNELS) && !defined(PYMPA_CUDA_EMULATED)

TensorView input(const char* op, const char* name, const Array& array) {
  // CuPy's arrays by their attributes: the array interface has no bfloat16.
  const py::object data = py::getattr(array, "data", py::none());
  if (!py::hasattr(data, "ptr")) {
    fail(op, name, "a CuPy array", py::str(py::type::of(array).attr("__name__")));
  }
  const auto shape = array.attr("shape").cast<std::vector<py::ssize_t>>();
  const auto strides = array.attr("strides").cast<std::vector<py::ssize_t>>();
  void* pointer = reinterpret_cast<void*>(data.attr("ptr").cast<std::uintptr_t>());
  return strided_view(op, name, pointer, py::dtype::from_args(array.attr("dtype")), shape.size(),
                      shape.data(), strides.data());
}

TensorView output(const char* op, const char* name, const Array& array) {
  return input(op, name, array);
}

#else

TensorView input(const char* op, const char* name, const Array& array) {
  return host_input(op, name, array);
}

TensorView output(const char* op, const char* name, const Array& array) {
  return host_output(op, name, array);
}

#endif

OptionalView::OptionalView(const char* op, const char* name, const Optional& array) {
  if (array) view_ = input(op, name, *array);
}

OptionalView OptionalView::writeable(const char* op, const char* name, const Optional& array) {
  OptionalView made;
  if (array) made.view_ = output(op, name, *array);
  return made;
}

OptionalView OptionalView::host(const char* op, const char* name, const HostOptional& array) {
  OptionalView made;
  if (array) made.view_ = host_input(op, name, *array);
  return made;
}

}  // namespace pympa::bindings
