#include "ops/rope.hpp"

#include "core/check.hpp"

namespace pympa {

void rope(const TensorView& x, const TensorView& cos, const TensorView& sin,
          const TensorView& index, bool interleaved, const Execution& on) {
  const char* op = "rope";
  check_float_dtype(op, x);
  check_shape(op, x, {-1, -1, -1});
  check_dtype(op, cos, DType::kFloat32);
  check_dtype(op, sin, DType::kFloat32);
  check_shape(op, cos, {-1, -1});
  check_shape(op, sin, {cos.shape[0], cos.shape[1]});
  if (2 * cos.shape[1] > x.shape[2]) {
    fail(op, cos.name, "at most " + std::to_string(x.shape[2] / 2) + " columns (head_dim / 2)",
         std::to_string(cos.shape[1]));
  }
  check_shape(op, index, {x.shape[0]});
  check_entries(op, index, 0, cos.shape[0]);
  const RopeArgs args{x.shape[0],
                      x.shape[1],
                      cos.shape[1],
                      x.dtype,
                      x.data,
                      x.stride[0],
                      x.stride[1],
                      static_cast<const float*>(cos.data),
                      static_cast<const float*>(sin.data),
                      cos.stride[0],
                      sin.stride[0],
                      static_cast<const std::int32_t*>(index.data),
                      interleaved,
                      on};
  PYMPA_SELECT_KERNELS(on.isa, rope_kernels).rope(args);
}

}  // namespace pympa
