#include "ops/elementwise.hpp"

#include "core/check.hpp"

namespace pympa {

void add(const TensorView& a, const TensorView& b, const TensorView& out, const Execution& on) {
  const char* op = "add";
  check_float_dtype(op, a);
  check_shape(op, a, {-1, -1});
  for (const TensorView* view : {&b, &out}) {
    check_dtype(op, *view, a.dtype);
    check_shape(op, *view, {a.shape[0], a.shape[1]});
  }
  const AddArgs args{a.shape[0],  a.shape[1],  a.dtype,  a.data,        b.data,
                     a.stride[0], b.stride[0], out.data, out.stride[0], on};
  PYMPA_SELECT_KERNELS(on.isa, elementwise_kernels).add(args);
}

void sum_partials(const TensorView& parts, const TensorView* bias, const TensorView& out,
                  const Execution& on) {
  const char* op = "sum_partials";
  check_float_dtype(op, parts);
  check_shape(op, parts, {-1, -1, -1});
  check_dtype(op, out, parts.dtype);
  check_shape(op, out, {parts.shape[1], parts.shape[2]});
  if (bias) {
    check_dtype(op, *bias, parts.dtype);
    check_shape(op, *bias, {parts.shape[2]});
  }
  const SumArgs args{parts.shape[0],
                     parts.shape[1],
                     parts.shape[2],
                     parts.dtype,
                     parts.data,
                     parts.stride[0],
                     parts.stride[1],
                     bias ? bias->data : nullptr,
                     out.data,
                     out.stride[0],
                     on};
  PYMPA_SELECT_KERNELS(on.isa, elementwise_kernels).sum_partials(args);
}

void softcap(const TensorView& x, double cap, const Execution& on) {
  const char* op = "softcap";
  check_dtype(op, x, DType::kFloat32);
  check_shape(op, x, {-1, -1});
  const SoftcapArgs args{x.shape[0],
                         x.shape[1],
                         static_cast<float*>(x.data),
                         x.stride[0],
                         check_range(op, "cap", cap, kLeastSoftcap, kMostSoftcap),
                         on};
  PYMPA_SELECT_KERNELS(on.isa, elementwise_kernels).softcap(args);
}

}  // namespace pympa
