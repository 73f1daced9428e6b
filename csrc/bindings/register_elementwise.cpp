#include <pybind11/stl.h>

#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "ops/elementwise.hpp"

namespace pympa::bindings {

namespace {

void bind_add(const py::array& a, const py::array& b, const py::array& out, int threads,
              const std::string& isa) {
  const char* op = "add";
  const TensorView a_view = input(op, "a", a);
  const TensorView b_view = input(op, "b", b);
  const TensorView out_view = output(op, "out", out);
  const Isa chosen = parse_isa(op, isa);
  py::gil_scoped_release release;
  add(a_view, b_view, out_view, threads, chosen);
}

void bind_sum_partials(const py::array& parts, const std::optional<py::array>& bias,
                       const py::array& out, int threads, const std::string& isa) {
  const char* op = "sum_partials";
  const TensorView parts_view = input(op, "parts", parts);
  const OptionalView bias_view(op, "bias", bias);
  const TensorView out_view = output(op, "out", out);
  const Isa chosen = parse_isa(op, isa);
  py::gil_scoped_release release;
  sum_partials(parts_view, bias_view.get(), out_view, threads, chosen);
}

}  // namespace

void register_elementwise(py::module_& module) {
  module.def("add", &bind_add, py::arg("a"), py::arg("b"), py::arg("out"), py::arg("threads"),
             py::arg("isa"));
  module.def("sum_partials", &bind_sum_partials, py::arg("parts"), py::arg("bias").none(true),
             py::arg("out"), py::arg("threads"), py::arg("isa"));
}

}  // namespace pympa::bindings
