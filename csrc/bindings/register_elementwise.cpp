#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "ops/elementwise.hpp"

namespace pympa::bindings {

namespace {

void bind_add(const Array& a, const Array& b, const Array& out, const Execution& on) {
  const char* op = "add";
  const TensorView a_view = input(op, "a", a);
  const TensorView b_view = input(op, "b", b);
  const TensorView out_view = output(op, "out", out);
  py::gil_scoped_release release;
  add(a_view, b_view, out_view, on);
}

void bind_sum_partials(const Array& parts, const Optional& bias, const Array& out,
                       const Execution& on) {
  const char* op = "sum_partials";
  const TensorView parts_view = input(op, "parts", parts);
  const OptionalView bias_view(op, "bias", bias);
  const TensorView out_view = output(op, "out", out);
  py::gil_scoped_release release;
  sum_partials(parts_view, bias_view.get(), out_view, on);
}

void bind_softcap(const Array& x, double cap, const Execution& on) {
  const TensorView x_view = output("softcap", "x", x);
  py::gil_scoped_release release;
  softcap(x_view, cap, on);
}

}  // namespace

void register_elementwise(py::module_& module) {
  module.def("add", &bind_add, py::arg("a"), py::arg("b"), py::arg("out"), py::arg("on"));
  module.def("sum_partials", &bind_sum_partials, py::arg("parts"), py::arg("bias").none(true),
             py::arg("out"), py::arg("on"));
  module.def("softcap", &bind_softcap, py::arg("x"), py::arg("cap"), py::arg("on"));
}

}  // namespace pympa::bindings
