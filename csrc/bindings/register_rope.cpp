#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "ops/rope.hpp"

namespace pympa::bindings {

namespace {

void bind_rope(const py::array& x, const py::array& cos, const py::array& sin,
               const py::array& index, int threads, const std::string& isa) {
  const char* op = "rope";
  const TensorView x_view = output(op, "x", x);
  const TensorView cos_view = input(op, "cos", cos);
  const TensorView sin_view = input(op, "sin", sin);
  const TensorView index_view = input(op, "index", index);
  const Isa chosen = parse_isa(op, isa);
  py::gil_scoped_release release;
  rope(x_view, cos_view, sin_view, index_view, threads, chosen);
}

}  // namespace

void register_rope(py::module_& module) {
  module.def("rope", &bind_rope, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("index"),
             py::arg("threads"), py::arg("isa"));
}

}  // namespace pympa::bindings
