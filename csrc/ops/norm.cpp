#include "ops/norm.hpp"

#include <cmath>

#include "core/check.hpp"

namespace pympa {

namespace {

void set_whole_rows(const char* op, NormArgs& args, const WholeRows& whole) {
  const TensorView& squares = *whole.squares;
  if (args.kind != NormKind::kRms) {
    fail(op, squares.name, "None with kind layer, which needs a row's mean", "an array");
  }
  check_dtype(op, squares, DType::kFloat32);
  check_shape(op, squares, {args.rows, 1});
  check_at_least(op, "width", whole.width, args.columns);
  args.squares = static_cast<const float*>(squares.data);
  args.squares_stride = squares.stride[0];
  args.width = whole.width;
}

}  // namespace

void norm(const TensorView& x, const TensorView& weight, const TensorView* bias, double eps,
          NormKind kind, double offset, const WholeRows& whole, const TensorView& out,
          const Execution& on) {
  const char* op = "norm";
  check_float_dtype(op, x);
  check_shape(op, x, {-1, -1});
  check_dtype(op, weight, x.dtype);
  check_shape(op, weight, {x.shape[1]});
  check_dtype(op, out, x.dtype);
  check_shape(op, out, {x.shape[0], x.shape[1]});
  if (bias) {
    check_dtype(op, *bias, x.dtype);
    check_shape(op, *bias, {x.shape[1]});
  }
  check_float(op, "abs(offset)", std::abs(offset), kLeastNormal, kMostFactor);
  NormArgs args{x.shape[0],
                x.shape[1],
                x.dtype,
                x.data,
                x.stride[0],
                weight.data,
                bias ? bias->data : nullptr,
                static_cast<float>(offset),
                check_float(op, "eps", eps, kLeastNormal, kMostFactor),
                kind,
                nullptr,
                0,
                x.shape[1],
                out.data,
                out.stride[0],
                on};
  if (whole.squares) set_whole_rows(op, args, whole);
  PYMPA_SELECT_KERNELS(on.isa, norm_kernels).norm(args);
}

void sum_squares(const TensorView& x, const TensorView& out, const Execution& on) {
  const char* op = "sum_squares";
  check_float_dtype(op, x);
  check_shape(op, x, {-1, -1});
  check_dtype(op, out, DType::kFloat32);
  check_shape(op, out, {x.shape[0], 1});
  const SumSquaresArgs args{x.shape[0],    x.shape[1],  x.dtype,
                            x.data,        x.stride[0], static_cast<float*>(out.data),
                            out.stride[0], on};
  PYMPA_SELECT_KERNELS(on.isa, norm_kernels).sum_squares(args);
}

}  // namespace pympa
