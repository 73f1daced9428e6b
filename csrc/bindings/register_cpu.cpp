// Functions that only the CPU module has: an MLP in one pass, and measurements of peaks.
#include "bindings/activation.hpp"
#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "core/check.hpp"
#include "ops/linear.hpp"
#include "ops/peak.hpp"

namespace pympa::bindings {

namespace {

void bind_mlp(const Array& x, const Optional& packed_gate, const Array& packed_up,
              const Array& packed_down, const Array& out, const Optional& bias_gate,
              const Optional& bias_up, const Optional& bias, const std::string& activation,
              double limit, double alpha, std::int64_t hidden, const Optional& residual,
              const Optional& branch, const HostOptional& group_rows, std::int64_t item_rows,
              const Array& workspace, const Execution& on) {
  const char* op = "mlp";
  const TensorView x_view = input(op, "x", x);
  const OptionalView gate_view(op, "packed_gate", packed_gate);
  const TensorView up_view = input(op, "packed_up", packed_up);
  const TensorView down_view = input(op, "packed_down", packed_down);
  const TensorView out_view = output(op, "out", out);
  const OptionalView bias_gate_view(op, "bias_gate", bias_gate);
  const OptionalView bias_up_view(op, "bias_up", bias_up);
  const OptionalView bias_view(op, "bias", bias);
  const OptionalView residual_view(op, "residual", residual);
  const OptionalView branch_view = OptionalView::writeable(op, "branch", branch);
  const OptionalView group_rows_view = OptionalView::host(op, "group_rows", group_rows);
  const TensorView workspace_view = output(op, "workspace", workspace);
  const MlpWeights weights{gate_view.get(),
                           &up_view,
                           &down_view,
                           bias_gate_view.get(),
                           bias_up_view.get(),
                           bias_view.get(),
                           hidden,
                           {parse_activation(op, activation), limit, alpha}};
  py::gil_scoped_release release;
  mlp(x_view, weights, out_view, residual_view.get(), branch_view.get(), group_rows_view.get(),
      item_rows, workspace_view, on);
}

double bind_product_peak(const std::string& dtype, const std::string& isa, double seconds) {
  const char* op = "product_peak";
  const DType chosen_dtype = parse_float_dtype(op, dtype);
  const Isa chosen = parse_isa(op, isa);
  py::gil_scoped_release release;
  return product_peak(chosen_dtype, chosen, seconds);
}

double bind_read_bandwidth(std::int64_t bytes, double seconds, std::int64_t tries) {
  py::gil_scoped_release release;
  return read_bandwidth(bytes, seconds, tries);
}

}  // namespace

void register_cpu(py::module_& module) {
  module.def(
      "mlp_workspace_bytes",
      [](std::int64_t item_rows, std::int64_t hidden, std::int64_t n, const std::string& dtype,
         bool gated, const Execution& on) {
        const char* op = "mlp_workspace_bytes";
        return mlp_workspace_bytes(item_rows, hidden, n, parse_float_dtype(op, dtype), gated, on);
      },
      py::arg("item_rows"), py::arg("hidden"), py::arg("n"), py::arg("dtype"), py::arg("gated"),
      py::arg("on"));
  module.def("mlp", &bind_mlp, py::arg("x"), py::arg("packed_gate").none(true),
             py::arg("packed_up"), py::arg("packed_down"), py::arg("out"),
             py::arg("bias_gate").none(true), py::arg("bias_up").none(true),
             py::arg("bias").none(true), py::arg("activation"), py::arg("limit"), py::arg("alpha"),
             py::arg("hidden"), py::arg("residual").none(true), py::arg("branch").none(true),
             py::arg("group_rows").none(true), py::arg("item_rows"), py::arg("workspace"),
             py::arg("on"));
  module.def("product_peak", &bind_product_peak, py::arg("dtype"), py::arg("isa"),
             py::arg("seconds"));
  module.def("read_bandwidth", &bind_read_bandwidth, py::arg("bytes"), py::arg("seconds"),
             py::arg("tries"));
}

}  // namespace pympa::bindings
