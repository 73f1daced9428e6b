#include <pybind11/stl.h>

#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "core/check.hpp"
#include "ops/linear.hpp"

namespace pympa::bindings {

namespace {

using Optional = std::optional<py::array>;

Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  fail(op, "activation", "none, gelu, gelu_tanh or silu", "'" + name + "'");
}

void bind_pack_weight(const py::array& weight, const py::array& packed, int threads,
                      const std::string& isa) {
  const char* op = "pack_weight";
  const TensorView weight_view = input(op, "weight", weight);
  const TensorView packed_view = output(op, "packed", packed);
  const Isa chosen = parse_isa(op, isa);
  py::gil_scoped_release release;
  pack_weight(weight_view, packed_view, threads, chosen);
}

void bind_linear(const py::array& x, const py::array& packed, const py::array& out,
                 const Optional& bias, const std::string& activation, const Optional& residual,
                 const Optional& branch, const Optional& group_rows, const py::array& workspace,
                 int threads, const std::string& isa) {
  const char* op = "linear";
  const TensorView x_view = input(op, "x", x);
  const TensorView packed_view = input(op, "packed", packed);
  const TensorView out_view = output(op, "out", out);
  const OptionalView bias_view(op, "bias", bias);
  const OptionalView residual_view(op, "residual", residual);
  const OptionalView branch_view(op, "branch", branch, true);
  const OptionalView group_rows_view(op, "group_rows", group_rows);
  const TensorView workspace_view = output(op, "workspace", workspace);
  const Activation chosen_activation = parse_activation(op, activation);
  const Isa chosen = parse_isa(op, isa);
  py::gil_scoped_release release;
  linear(x_view, packed_view, out_view, bias_view.get(), chosen_activation, residual_view.get(),
         branch_view.get(), group_rows_view.get(), workspace_view, threads, chosen);
}

void bind_gated_linear(const py::array& x, const py::array& packed_gate, const py::array& packed_up,
                       const py::array& out, const Optional& bias_gate, const Optional& bias_up,
                       const std::string& activation, const Optional& group_rows,
                       const py::array& workspace, int threads, const std::string& isa) {
  const char* op = "gated_linear";
  const TensorView x_view = input(op, "x", x);
  const TensorView gate_view = input(op, "packed_gate", packed_gate);
  const TensorView up_view = input(op, "packed_up", packed_up);
  const TensorView out_view = output(op, "out", out);
  const OptionalView bias_gate_view(op, "bias_gate", bias_gate);
  const OptionalView bias_up_view(op, "bias_up", bias_up);
  const OptionalView group_rows_view(op, "group_rows", group_rows);
  const TensorView workspace_view = output(op, "workspace", workspace);
  const Activation chosen_activation = parse_activation(op, activation);
  const Isa chosen = parse_isa(op, isa);
  py::gil_scoped_release release;
  gated_linear(x_view, gate_view, up_view, out_view, bias_gate_view.get(), bias_up_view.get(),
               chosen_activation, group_rows_view.get(), workspace_view, threads, chosen);
}

void bind_mlp(const py::array& x, const Optional& packed_gate, const py::array& packed_up,
              const py::array& packed_down, const py::array& out, const Optional& bias_gate,
              const Optional& bias_up, const Optional& bias, const std::string& activation,
              std::int64_t hidden, const Optional& residual, const Optional& branch,
              const Optional& group_rows, std::int64_t item_rows, const py::array& workspace,
              int threads, const std::string& isa) {
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
  const OptionalView branch_view(op, "branch", branch, true);
  const OptionalView group_rows_view(op, "group_rows", group_rows);
  const TensorView workspace_view = output(op, "workspace", workspace);
  const MlpWeights weights{
      gate_view.get(),    &up_view,        &down_view, bias_gate_view.get(),
      bias_up_view.get(), bias_view.get(), hidden,     parse_activation(op, activation)};
  const Isa chosen = parse_isa(op, isa);
  py::gil_scoped_release release;
  mlp(x_view, weights, out_view, residual_view.get(), branch_view.get(), group_rows_view.get(),
      item_rows, workspace_view, threads, chosen);
}

}  // namespace

void register_linear(py::module_& module) {
  module.def(
      "packed_weight_bytes",
      [](std::int64_t n, std::int64_t k, const std::string& dtype, const std::string& isa) {
        const char* op = "packed_weight_bytes";
        return packed_weight_bytes(n, k, parse_float_dtype(op, dtype), parse_isa(op, isa));
      },
      py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("isa"));
  module.def("pack_weight", &bind_pack_weight, py::arg("weight"), py::arg("packed"),
             py::arg("threads"), py::arg("isa"));
  module.def(
      "linear_workspace_bytes",
      [](std::int64_t m, std::int64_t n, std::int64_t k, const std::string& dtype, bool gated,
         int threads, const std::string& isa) {
        const char* op = "linear_workspace_bytes";
        return linear_workspace_bytes(m, n, k, parse_float_dtype(op, dtype), gated, threads,
                                      parse_isa(op, isa));
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("gated"),
      py::arg("threads"), py::arg("isa"));
  module.def("linear", &bind_linear, py::arg("x"), py::arg("packed"), py::arg("out"),
             py::arg("bias").none(true), py::arg("activation"), py::arg("residual").none(true),
             py::arg("branch").none(true), py::arg("group_rows").none(true), py::arg("workspace"),
             py::arg("threads"), py::arg("isa"));
  module.def("gated_linear", &bind_gated_linear, py::arg("x"), py::arg("packed_gate"),
             py::arg("packed_up"), py::arg("out"), py::arg("bias_gate").none(true),
             py::arg("bias_up").none(true), py::arg("activation"), py::arg("group_rows").none(true),
             py::arg("workspace"), py::arg("threads"), py::arg("isa"));
  module.def(
      "mlp_workspace_bytes",
      [](std::int64_t item_rows, std::int64_t hidden, std::int64_t n, bool gated, int threads,
         const std::string& isa) {
        return mlp_workspace_bytes(item_rows, hidden, n, gated, threads,
                                   parse_isa("mlp_workspace_bytes", isa));
      },
      py::arg("item_rows"), py::arg("hidden"), py::arg("n"), py::arg("gated"), py::arg("threads"),
      py::arg("isa"));
  module.def("mlp", &bind_mlp, py::arg("x"), py::arg("packed_gate").none(true),
             py::arg("packed_up"), py::arg("packed_down"), py::arg("out"),
             py::arg("bias_gate").none(true), py::arg("bias_up").none(true),
             py::arg("bias").none(true), py::arg("activation"), py::arg("hidden"),
             py::arg("residual").none(true), py::arg("branch").none(true),
             py::arg("group_rows").none(true), py::arg("item_rows"), py::arg("workspace"),
             py::arg("threads"), py::arg("isa"));
}

}  // namespace pympa::bindings
