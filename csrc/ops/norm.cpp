#include "ops/norm.hpp"

#include "core/check.hpp"

namespace pympa {

void norm(const TensorView& x, const TensorView& weight, const TensorView* bias, double eps,
          NormKind kind, const TensorView& out, const Execution& on) {
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
  const NormArgs args{x.shape[0],
                      x.shape[1],
                      x.dtype,
                      x.data,
                      x.stride[0],
                      weight.data,
                      bias ? bias->data : nullptr,
                      check_float(op, "eps", eps, kLeastNormal, kMostFactor),
                      kind,
                      out.data,
                      out.stride[0],
                      on};
  PYMPA_SELECT_KERNELS(on.isa, norm_kernels).norm(args);
}

}  // namespace pympa
