#include "ops/linear_args.hpp"

namespace pympa {

std::int64_t mlp_workspace_bytes(std::int64_t item_rows, std::int64_t hidden, std::int64_t n,
                                 DType dtype, bool gated, const Execution& on) {
  const char* op = "mlp_workspace_bytes";
  check_at_least(op, "item_rows", item_rows, 1);
  check_at_least(op, "hidden", hidden, 0);
  check_at_least(op, "n", n, 0);
  return PYMPA_SELECT_KERNELS(isa_for(dtype, on.isa), mlp_kernels)
      .workspace_bytes(item_rows, hidden, n, dtype, gated, on);
}

void mlp(const TensorView& x, const MlpWeights& weights, const TensorView& out,
         const TensorView* residual, const TensorView* branch, const TensorView* group_rows,
         std::int64_t item_rows, const TensorView& workspace, const Execution& on) {
  const char* op = "mlp";
  const bool gated = weights.gate != nullptr, grouped = group_rows != nullptr;
  MlpArgs args{};
  args.down = common_args(op, x, out, group_rows, on);
  check_buffer(op, workspace,
               mlp_workspace_bytes(item_rows, weights.hidden, args.down.n, x.dtype, gated, on));
  args.up = args.down;
  args.up.n = args.down.k = weights.hidden;
  set_activation(op, args.up, weights.rule, gated);
  args.up.workspace = workspace.data;
  args.item_rows = item_rows;
  if (gated) set_weight(op, args.up, 0, *weights.gate, weights.gate_bias, grouped);
  set_weight(op, args.up, gated ? 1 : 0, *weights.up, weights.up_bias, grouped);
  set_weight(op, args.down, 0, *weights.down, weights.bias, grouped);
  set_residual(op, args.down, residual, branch);
  PYMPA_SELECT_KERNELS(isa_for(args.up.dtype, on.isa), mlp_kernels).mlp(args);
}

}  // namespace pympa
