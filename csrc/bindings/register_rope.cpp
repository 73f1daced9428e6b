#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "ops/rope.hpp"

namespace pympa::bindings {

namespace {

void bind_rope(const Array& x, const Array& cos, const Array& sin, const Array& index,
               bool interleaved, const Execution& on) {
  const char* op = "rope";
  const TensorView x_view = output(op, "x", x);
  const TensorView cos_view = input(op, "cos", cos);
  const TensorView sin_view = input(op, "sin", sin);
  const TensorView index_view = input(op, "index", index);
  py::gil_scoped_release release;
  rope(x_view, cos_view, sin_view, index_view, interleaved, on);
}

}  // namespace

void register_rope(py::module_& module) {
  module.def("rope", &bind_rope, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("index"),
             py::arg("interleaved"), py::arg("on"));
}

}  // namespace pympa::bindings
