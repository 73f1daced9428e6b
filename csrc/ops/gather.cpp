#include "ops/gather.hpp"

#include "core/check.hpp"

namespace pympa {

void gather_rows(const TensorView& source, const TensorView& index, const TensorView& out,
                 std::int64_t first_row, const Execution& on) {
  const char* op = "gather_rows";
  check_float_dtype(op, source);
  check_shape(op, source, {-1, -1});
  check_dtype(op, index, DType::kInt32);
  check_shape(op, index, {-1});
  check_dtype(op, out, source.dtype);
  check_shape(op, out, {index.shape[0], source.shape[1]});
  check_at_least(op, "first_row", first_row, 0);
  const std::int64_t element_bytes = source.dtype == DType::kFloat32 ? 4 : 2;
  const GatherArgs args{index.shape[0],
                        source.shape[1] * element_bytes,
                        source.shape[0],
                        first_row,
                        source.data,
                        source.stride[0] * element_bytes,
                        static_cast<const std::int32_t*>(index.data),
                        out.data,
                        out.stride[0] * element_bytes,
                        on};
  PYMPA_SELECT_KERNELS(on.isa, gather_kernels).gather_rows(args);
}

}  // namespace pympa
