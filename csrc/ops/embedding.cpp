#include "ops/embedding.hpp"

#include "core/check.hpp"

namespace pympa {

void embed(const TensorView& ids, const TensorView& table, std::int64_t first_row,
           const TensorView& out, int threads, Isa isa) {
  const char* op = "embed";
  check_dtype(op, ids, DType::kInt32);
  check_shape(op, ids, {-1});
  check_float_dtype(op, table);
  check_shape(op, table, {-1, -1});
  check_at_least(op, "first_row", first_row, 0);
  check_dtype(op, out, table.dtype);
  check_shape(op, out, {ids.shape[0], table.shape[1]});
  check_at_least(op, "threads", threads, 1);
  const std::int64_t element_bytes = table.dtype == DType::kFloat32 ? 4 : 2;
  const EmbedArgs args{ids.shape[0],
                       table.shape[1] * element_bytes,
                       table.shape[0],
                       first_row,
                       static_cast<const std::int32_t*>(ids.data),
                       table.data,
                       table.stride[0] * element_bytes,
                       out.data,
                       out.stride[0] * element_bytes,
                       threads};
  PYMPA_SELECT_KERNELS(isa, embedding_kernels).embed(args);
}

}  // namespace pympa
