#include "bindings/activation.hpp"
#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "core/check.hpp"
#include "ops/linear.hpp"

namespace pympa::bindings {

namespace {

void bind_pack_weight(const Array& weight, const Array& packed, const Execution& on) {
  const char* op = "pack_weight";
  const TensorView weight_view = input(op, "weight", weight);
  const TensorView packed_view = output(op, "packed", packed);
  py::gil_scoped_release release;
  pack_weight(weight_view, packed_view, on);
}

void bind_linear(const Array& x, const Array& packed, const Array& out, const Optional& bias,
                 const std::string& activation, const Optional& residual, const Optional& branch,
                 const HostOptional& group_rows, const Array& workspace, const Execution& on) {
  const char* op = "linear";
  const TensorView x_view = input(op, "x", x);
  const TensorView packed_view = input(op, "packed", packed);
  const TensorView out_view = output(op, "out", out);
  const OptionalView bias_view(op, "bias", bias);
  const OptionalView residual_view(op, "residual", residual);
  const OptionalView branch_view = OptionalView::writeable(op, "branch", branch);
  const OptionalView group_rows_view = OptionalView::host(op, "group_rows", group_rows);
  const TensorView workspace_view = output(op, "workspace", workspace);
  const Activation chosen_activation = parse_activation(op, activation);
  py::gil_scoped_release release;
  linear(x_view, packed_view, out_view, bias_view.get(), chosen_activation, residual_view.get(),
         branch_view.get(), group_rows_view.get(), workspace_view, on);
}

void bind_gated_linear(const Array& x, const Array& packed_gate, const Array& packed_up,
                       const Array& out, const Optional& bias_gate, const Optional& bias_up,
                       const std::string& activation, double limit, double alpha,
                       const HostOptional& group_rows, const Array& workspace,
                       const Execution& on) {
  const char* op = "gated_linear";
  const TensorView x_view = input(op, "x", x);
  const TensorView gate_view = input(op, "packed_gate", packed_gate);
  const TensorView up_view = input(op, "packed_up", packed_up);
  const TensorView out_view = output(op, "out", out);
  const OptionalView bias_gate_view(op, "bias_gate", bias_gate);
  const OptionalView bias_up_view(op, "bias_up", bias_up);
  const OptionalView group_rows_view = OptionalView::host(op, "group_rows", group_rows);
  const TensorView workspace_view = output(op, "workspace", workspace);
  const ActivationRule rule{parse_activation(op, activation), limit, alpha};
  py::gil_scoped_release release;
  gated_linear(x_view, gate_view, up_view, out_view, bias_gate_view.get(), bias_up_view.get(), rule,
               group_rows_view.get(), workspace_view, on);
}

}  // namespace

void register_linear(py::module_& module) {
  module.def(
      "packed_weight_bytes",
      [](std::int64_t n, std::int64_t k, const std::string& dtype, const Execution& on) {
        const char* op = "packed_weight_bytes";
        return packed_weight_bytes(n, k, parse_float_dtype(op, dtype), on);
      },
      py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("on"));
  module.def("pack_weight", &bind_pack_weight, py::arg("weight"), py::arg("packed"), py::arg("on"));
  module.def(
      "linear_workspace_bytes",
      [](std::int64_t m, std::int64_t n, std::int64_t k, const std::string& dtype, bool gated,
         const Execution& on) {
        const char* op = "linear_workspace_bytes";
        return linear_workspace_bytes(m, n, k, parse_float_dtype(op, dtype), gated, on);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("gated"), py::arg("on"));
  module.def("linear", &bind_linear, py::arg("x"), py::arg("packed"), py::arg("out"),
             py::arg("bias").none(true), py::arg("activation"), py::arg("residual").none(true),
             py::arg("branch").none(true), py::arg("group_rows").none(true), py::arg("workspace"),
             py::arg("on"));
  module.def("gated_linear", &bind_gated_linear, py::arg("x"), py::arg("packed_gate"),
             py::arg("packed_up"), py::arg("out"), py::arg("bias_gate").none(true),
             py::arg("bias_up").none(true), py::arg("activation"), py::arg("limit"),
             py::arg("alpha"), py::arg("group_rows").none(true), py::arg("workspace"),
             py::arg("on"));
}

}  // namespace pympa::bindings
