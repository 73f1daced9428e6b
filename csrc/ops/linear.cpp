#include "ops/linear_args.hpp"

namespace pympa {

std::int64_t packed_weight_bytes(std::int64_t n, std::int64_t k, DType dtype, const Execution& on) {
  check_at_least("packed_weight_bytes", "n", n, 0);
  check_at_least("packed_weight_bytes", "k", k, 0);
  return PYMPA_SELECT_KERNELS(isa_for(dtype, on.isa), linear_kernels).packed_bytes(n, k, dtype);
}

void pack_weight(const TensorView& weight, const TensorView& packed, const Execution& on) {
  const char* op = "pack_weight";
  check_float_dtype(op, weight);
  check_shape(op, weight, {-1, -1});
  const std::int64_t n = weight.shape[0], k = weight.shape[1];
  check_buffer(op, packed, packed_weight_bytes(n, k, weight.dtype, on));
  const PackWeightArgs args{n, k, weight.dtype, weight.data, weight.stride[0], packed.data, on};
  PYMPA_SELECT_KERNELS(isa_for(args.dtype, on.isa), linear_kernels).pack_weight(args);
}

std::int64_t linear_workspace_bytes(std::int64_t m, std::int64_t n, std::int64_t k, DType dtype,
                                    bool gated, const Execution& on) {
  const char* op = "linear_workspace_bytes";
  check_at_least(op, "m", m, 0);
  check_at_least(op, "n", n, 0);
  check_at_least(op, "k", k, 0);
  return PYMPA_SELECT_KERNELS(isa_for(dtype, on.isa), linear_kernels)
      .workspace_bytes(m, n, dtype, gated, on);
}

void linear(const TensorView& x, const TensorView& packed, const TensorView& out,
            const TensorView* bias, Activation activation, const TensorView* residual,
            const TensorView* branch, const TensorView* group_rows, const TensorView& workspace,
            const Execution& on) {
  const char* op = "linear";
  LinearArgs args = common_args(op, x, out, group_rows, on);
  set_activation(op, args, {activation, 0.0, 0.0}, false);
  set_workspace(op, args, workspace, false);
  set_weight(op, args, 0, packed, bias, group_rows != nullptr);
  set_residual(op, args, residual, branch);
  PYMPA_SELECT_KERNELS(isa_for(args.dtype, on.isa), linear_kernels).linear(args);
}

void gated_linear(const TensorView& x, const TensorView& packed_gate, const TensorView& packed_up,
                  const TensorView& out, const TensorView* bias_gate, const TensorView* bias_up,
                  const ActivationRule& rule, const TensorView* group_rows,
                  const TensorView& workspace, const Execution& on) {
  const char* op = "gated_linear";
  LinearArgs args = common_args(op, x, out, group_rows, on);
  set_activation(op, args, rule, true);
  set_workspace(op, args, workspace, true);
  set_weight(op, args, 0, packed_gate, bias_gate, group_rows != nullptr);
  set_weight(op, args, 1, packed_up, bias_up, group_rows != nullptr);
  PYMPA_SELECT_KERNELS(isa_for(args.dtype, on.isa), linear_kernels).linear(args);
}

}  // namespace pympa
