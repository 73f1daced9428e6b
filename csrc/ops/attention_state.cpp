#include "core/check.hpp"
#include "ops/attention.hpp"

namespace pympa {

namespace {

void check_contiguous(const char* op, const TensorView& view) {
  std::int64_t expected = 1;
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    if (view.shape[axis] > 1 && view.stride[axis] != expected && view.size() > 0) {
      fail(op, view.name, "a contiguous array",
           "stride " + std::to_string(view.stride[axis]) + " on axis " + std::to_string(axis));
    }
    expected *= view.shape[axis];
  }
}

AttentionState contiguous_state(const char* op, const TensorView& row_max,
                                const TensorView& row_sum, const TensorView& out,
                                const TensorView& like) {
  check_shape(op, out, {like.shape[0], like.shape[1], like.shape[2]});
  check_shape(op, row_max, {like.shape[0], like.shape[1]});
  check_shape(op, row_sum, {like.shape[0], like.shape[1]});
  for (const TensorView* view : {&row_max, &row_sum, &out}) {
    check_dtype(op, *view, DType::kFloat32);
    check_contiguous(op, *view);
  }
  return {static_cast<float*>(row_max.data), static_cast<float*>(row_sum.data),
          static_cast<float*>(out.data)};
}

}  // namespace

void start_state(const TensorView& row_max, const TensorView& row_sum, const TensorView& out,
                 const TensorView* sinks, const Execution& on) {
  const char* op = "start_state";
  check_shape(op, out, {-1, -1, -1});
  if (sinks) {
    check_float_dtype(op, *sinks);
    check_shape(op, *sinks, {out.shape[1]});
  }
  const StartArgs args{out.shape[0] * out.shape[1],
                       out.shape[1],
                       out.shape[2],
                       contiguous_state(op, row_max, row_sum, out, out),
                       sinks ? sinks->dtype : DType::kFloat32,
                       sinks ? sinks->data : nullptr,
                       on};
  PYMPA_SELECT_KERNELS(on.isa, attention_state_kernels).start(args);
}

void merge(const TensorView& row_max, const TensorView& row_sum, const TensorView& out,
           const TensorView& other_row_max, const TensorView& other_row_sum,
           const TensorView& other_out, const Execution& on) {
  const char* op = "merge";
  check_shape(op, out, {-1, -1, -1});
  const MergeArgs args{out.shape[0] * out.shape[1], out.shape[2],
                       contiguous_state(op, row_max, row_sum, out, out),
                       contiguous_state(op, other_row_max, other_row_sum, other_out, out), on};
  PYMPA_SELECT_KERNELS(on.isa, attention_state_kernels).merge(args);
}

void finish(const TensorView& row_max, const TensorView& row_sum, const TensorView& out,
            const TensorView& o, const TensorView& lse, const Execution& on) {
  const char* op = "finish";
  check_shape(op, out, {-1, -1, -1});
  check_float_dtype(op, o);
  check_shape(op, o, {out.shape[0], out.shape[1], out.shape[2]});
  check_contiguous(op, o);
  check_dtype(op, lse, DType::kFloat32);
  check_shape(op, lse, {out.shape[0], out.shape[1]});
  check_contiguous(op, lse);
  const FinishArgs args{out.shape[0] * out.shape[1],
                        out.shape[2],
                        contiguous_state(op, row_max, row_sum, out, out),
                        o.dtype,
                        o.data,
                        static_cast<float*>(lse.data),
                        on};
  PYMPA_SELECT_KERNELS(on.isa, attention_state_kernels).finish(args);
}

}  // namespace pympa
