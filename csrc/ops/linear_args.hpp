// Checks the arguments of linears and MLPs, and fills in the arguments of kernels.
#pragma once

#include "core/check.hpp"
#include "ops/linear.hpp"

namespace pympa {

// Checks the rows that a layer reads and writes, and fills them in.
inline LinearArgs common_args(const char* op, const TensorView& x, const TensorView& out,
                              const TensorView* group_rows, const Execution& on) {
  check_float_dtype(op, x);
  check_shape(op, x, {-1, -1});
  check_shape(op, out, {x.shape[0], -1});
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
  args.out = out.data;
  args.out_stride = out.stride[0];
  args.on = on;
  return args;
}

inline void set_activation(const char* op, LinearArgs& args, const ActivationRule& rule,
                           bool gated) {
  args.activation = rule.activation;
  if (rule.activation != Activation::kSwigluClamped) return;
  if (!gated) {
    fail(op, "activation", "none, gelu, gelu_tanh or silu without a gate", "'swiglu_clamped'");
  }
  args.limit = check_range(op, "limit", rule.limit, kLeastNormal, kMostFactor);
  args.alpha = check_range(op, "alpha", rule.alpha, kLeastNormal, kMostFactor);
}

inline void set_workspace(const char* op, LinearArgs& args, const TensorView& workspace,
                          bool gated) {
  check_buffer(op, workspace,
               linear_workspace_bytes(args.m, args.n, args.k, args.dtype, gated, args.on));
  args.workspace = workspace.data;
}

inline void set_weight(const char* op, LinearArgs& args, int which, const TensorView& packed,
                       const TensorView* bias, bool grouped) {
  const std::int64_t bytes = packed_weight_bytes(args.n, args.k, args.dtype, args.on);
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

inline void check_like_out(const char* op, const TensorView& view, const LinearArgs& args) {
  check_dtype(op, view, args.out_dtype);
  check_shape(op, view, {args.m, args.n});
}

inline void set_residual(const char* op, LinearArgs& args, const TensorView* residual,
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

}  // namespace pympa
