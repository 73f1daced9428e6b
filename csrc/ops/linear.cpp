#include "ops/linear.hpp"

#include "core/check.hpp"

namespace pympa {

namespace {

// Checks the rows that a layer reads and writes, and fills them in.
LinearArgs common_args(const char* op, const TensorView& x, const TensorView& out,
                       Activation activation, const TensorView* group_rows, int threads) {
  check_float_dtype(op, x);
  check_shape(op, x, {-1, -1});
  check_shape(op, out, {x.shape[0], -1});
  check_at_least(op, "threads", threads, 1);
  if (out.dtype != DType::kFloat32) check_dtype(op, out, x.dtype);
  if (group_rows) check_row_counts(op, *group_rows, x.shape[0]);
  LinearArgs args{};
  args.m = x.shape[0];
  args.n = out.shape[1];
  args.k = x.shape[1];
  args.dtype = x.dtype;
  args.out_dtype = out.dtype;
  args.groups = group_rows ? group_rows->shape[0] : 1;
  args.group_rows = group_rows ? static_cast<const std::int64_t*>(group_rows->data) : &x.shape[0];
  args.x = x.data;
  args.x_stride = x.stride[0];
  args.activation = activation;
  args.out = out.data;
  args.out_stride = out.stride[0];
  args.threads = threads;
  return args;
}

void set_workspace(const char* op, LinearArgs& args, const TensorView& workspace, bool gated,
                   Isa isa) {
  const LinearKernels& kernels = PYMPA_SELECT_KERNELS(isa, linear_kernels);
  check_buffer(op, workspace, kernels.workspace_bytes(args.m, args.n, gated, args.threads));
  args.workspace = workspace.data;
}

void set_weight(const char* op, LinearArgs& args, int which, const TensorView& packed,
                const TensorView* bias, bool grouped, Isa isa) {
  const std::int64_t bytes = packed_weight_bytes(args.n, args.k, args.dtype, isa);
  if (grouped) {
    check_buffers(op, packed, args.groups, bytes);
  } else {
    check_buffer(op, packed, bytes);
  }
  args.packed[which] = packed.data;
  args.packed_bytes[which] = packed.stride[0];
  if (!bias) return;
  check_dtype(op, *bias, args.dtype);
  if (grouped) {
    check_shape(op, *bias, {args.groups, args.n});
  } else {
    check_shape(op, *bias, {args.n});
  }
  args.bias[which] = bias->data;
  args.bias_stride[which] = bias->stride[0];
}

void check_like_out(const char* op, const TensorView& view, const LinearArgs& args) {
  check_dtype(op, view, args.out_dtype);
  check_shape(op, view, {args.m, args.n});
}

void set_residual(const char* op, LinearArgs& args, const TensorView* residual,
                  const TensorView* branch) {
  if (residual) {
    check_like_out(op, *residual, args);
    args.residual = residual->data;
    args.residual_stride = residual->stride[0];
  }
  if (branch) {
    check_like_out(op, *branch, args);
    args.branch = branch->data;
    args.branch_stride = branch->stride[0];
  }
}

}  // namespace

std::int64_t packed_weight_bytes(std::int64_t n, std::int64_t k, DType dtype, Isa isa) {
  check_at_least("packed_weight_bytes", "n", n, 0);
  check_at_least("packed_weight_bytes", "k", k, 0);
  return PYMPA_SELECT_KERNELS(isa, linear_kernels).packed_bytes(n, k, dtype);
}

void pack_weight(const TensorView& weight, const TensorView& packed, int threads, Isa isa) {
  const char* op = "pack_weight";
  check_at_least(op, "threads", threads, 1);
  check_float_dtype(op, weight);
  check_shape(op, weight, {-1, -1});
  const std::int64_t n = weight.shape[0], k = weight.shape[1];
  check_buffer(op, packed, packed_weight_bytes(n, k, weight.dtype, isa));
  const PackWeightArgs args{n,           k,      weight.dtype, weight.data, weight.stride[0],
                            packed.data, threads};
  PYMPA_SELECT_KERNELS(isa, linear_kernels).pack_weight(args);
}

std::int64_t linear_workspace_bytes(std::int64_t m, std::int64_t n, std::int64_t k, DType,
                                    bool gated, int threads, Isa isa) {
  const char* op = "linear_workspace_bytes";
  check_at_least(op, "m", m, 0);
  check_at_least(op, "n", n, 0);
  check_at_least(op, "k", k, 0);
  check_at_least(op, "threads", threads, 1);
  return PYMPA_SELECT_KERNELS(isa, linear_kernels).workspace_bytes(m, n, gated, threads);
}

void linear(const TensorView& x, const TensorView& packed, const TensorView& out,
            const TensorView* bias, Activation activation, const TensorView* residual,
            const TensorView* branch, const TensorView* group_rows, const TensorView& workspace,
            int threads, Isa isa) {
  const char* op = "linear";
  LinearArgs args = common_args(op, x, out, activation, group_rows, threads);
  set_workspace(op, args, workspace, false, isa);
  set_weight(op, args, 0, packed, bias, group_rows != nullptr, isa);
  set_residual(op, args, residual, branch);
  PYMPA_SELECT_KERNELS(isa, linear_kernels).linear(args);
}

void gated_linear(const TensorView& x, const TensorView& packed_gate, const TensorView& packed_up,
                  const TensorView& out, const TensorView* bias_gate, const TensorView* bias_up,
                  Activation activation, const TensorView* group_rows, const TensorView& workspace,
                  int threads, Isa isa) {
  const char* op = "gated_linear";
  LinearArgs args = common_args(op, x, out, activation, group_rows, threads);
  set_workspace(op, args, workspace, true, isa);
  set_weight(op, args, 0, packed_gate, bias_gate, group_rows != nullptr, isa);
  set_weight(op, args, 1, packed_up, bias_up, group_rows != nullptr, isa);
  PYMPA_SELECT_KERNELS(isa, linear_kernels).linear(args);
}

std::int64_t mlp_workspace_bytes(std::int64_t item_rows, std::int64_t hidden, std::int64_t n,
                                 bool gated, int threads, Isa isa) {
  const char* op = "mlp_workspace_bytes";
  check_at_least(op, "item_rows", item_rows, 1);
  check_at_least(op, "hidden", hidden, 0);
  check_at_least(op, "n", n, 0);
  check_at_least(op, "threads", threads, 1);
  return PYMPA_SELECT_KERNELS(isa, mlp_kernels)
      .workspace_bytes(item_rows, hidden, n, gated, threads);
}

void mlp(const TensorView& x, const MlpWeights& weights, const TensorView& out,
         const TensorView* residual, const TensorView* branch, const TensorView* group_rows,
         std::int64_t item_rows, const TensorView& workspace, int threads, Isa isa) {
  const char* op = "mlp";
  const bool gated = weights.gate != nullptr, grouped = group_rows != nullptr;
  check_buffer(op, workspace,
               mlp_workspace_bytes(item_rows, weights.hidden, out.shape[1], gated, threads, isa));
  MlpArgs args{};
  args.down = common_args(op, x, out, Activation::kNone, group_rows, threads);
  args.up = args.down;
  args.up.n = args.down.k = weights.hidden;
  args.up.activation = weights.activation;
  args.up.workspace = workspace.data;
  args.item_rows = item_rows;
  if (gated) set_weight(op, args.up, 0, *weights.gate, weights.gate_bias, grouped, isa);
  set_weight(op, args.up, gated ? 1 : 0, *weights.up, weights.up_bias, grouped, isa);
  set_weight(op, args.down, 0, *weights.down, weights.bias, grouped, isa);
  set_residual(op, args.down, residual, branch);
  PYMPA_SELECT_KERNELS(isa, mlp_kernels).mlp(args);
}

}  // namespace pympa
