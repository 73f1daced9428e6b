#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "core/check.hpp"
#include "ops/norm.hpp"

namespace pympa::bindings {

namespace {

NormKind parse_kind(const char* op, const std::string& name) {
  if (name == "rms") return NormKind::kRms;
  if (name == "layer") return NormKind::kLayer;
  fail(op, "kind", "rms or layer", "'" + name + "'");
}

void bind_norm(const Array& x, const Array& weight, const Optional& bias, double eps,
               const std::string& kind, double offset, const Optional& squares, std::int64_t width,
               const Array& out, const Execution& on) {
  const char* op = "norm";
  const TensorView x_view = input(op, "x", x);
  const TensorView weight_view = input(op, "weight", weight);
  const OptionalView bias_view(op, "bias", bias);
  const OptionalView squares_view(op, "squares", squares);
  const TensorView out_view = output(op, "out", out);
  const NormKind chosen_kind = parse_kind(op, kind);
  py::gil_scoped_release release;
  norm(x_view, weight_view, bias_view.get(), eps, chosen_kind, offset, {squares_view.get(), width},
       out_view, on);
}

void bind_sum_squares(const Array& x, const Array& out, const Execution& on) {
  const char* op = "sum_squares";
  const TensorView x_view = input(op, "x", x);
  const TensorView out_view = output(op, "out", out);
  py::gil_scoped_release release;
  sum_squares(x_view, out_view, on);
}

}  // namespace

void register_norm(py::module_& module) {
  module.def("norm", &bind_norm, py::arg("x"), py::arg("weight"), py::arg("bias").none(true),
             py::arg("eps"), py::arg("kind"), py::arg("offset"), py::arg("squares").none(true),
             py::arg("width"), py::arg("out"), py::arg("on"));
  module.def("sum_squares", &bind_sum_squares, py::arg("x"), py::arg("out"), py::arg("on"));
}

}  // namespace pympa::bindings
