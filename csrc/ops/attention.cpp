#include "ops/attention.hpp"

#include <cmath>

#include "core/check.hpp"

namespace pympa {

namespace {

// Ranges [n, 3] must cover `rows` rows exactly.
void check_ranges(const char* op, const TensorView& ranges, std::int64_t rows) {
  check_dtype(op, ranges, DType::kInt64);
  check_shape(op, ranges, {-1, 3});
  if (ranges.shape[0] > 1 && ranges.stride[0] != 3) {
    fail(op, ranges.name, "a contiguous array", "row stride " + std::to_string(ranges.stride[0]));
  }
  const TokenRange* items = static_cast<const TokenRange*>(ranges.data);
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < ranges.shape[0]; ++i) {
    check_at_least(op, "range start", items[i].start, 0);
    check_at_least(op, "range length", items[i].length, 0);
    total += items[i].length;
  }
  if (total != rows) {
    fail(op, ranges.name, "lengths that add up to " + std::to_string(rows) + " rows",
         std::to_string(total));
  }
}

void check_head_map(const char* op, const TensorView& map, std::int64_t heads,
                    std::int64_t kv_heads) {
  check_dtype(op, map, DType::kInt32);
  check_shape(op, map, {heads});
  const std::int32_t* kv_head_of_q = static_cast<const std::int32_t*>(map.data);
  for (std::int64_t head = 0; head < heads; ++head) {
    if (kv_head_of_q[head] < 0 || kv_head_of_q[head] >= kv_heads) {
      fail(op, map.name, "entries in [0, " + std::to_string(kv_heads) + ")",
           std::to_string(kv_head_of_q[head]) + " for head " + std::to_string(head));
    }
  }
}

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

std::int64_t attention_workspace_bytes(std::int64_t head_dim, std::int64_t v_head_dim, DType dtype,
                                       int threads, Isa isa) {
  const char* op = "attention_workspace_bytes";
  check_at_least(op, "head_dim", head_dim, 1);
  check_at_least(op, "v_head_dim", v_head_dim, 1);
  check_at_least(op, "threads", threads, 1);
  return PYMPA_SELECT_KERNELS(isa, attention_kernels)
      .workspace_bytes(head_dim, v_head_dim, dtype, threads);
}

void attend_block(const TensorView& q, const TensorView& k, const TensorView& v,
                  const TensorView& q_ranges, const TensorView& k_ranges, const TensorView& row_max,
                  const TensorView& row_sum, const TensorView& out, const TensorView& kv_head_of_q,
                  float scale, bool causal, std::int64_t window, float softcap,
                  const TensorView& workspace, int threads, Isa isa) {
  const char* op = "attend_block";
  check_float_dtype(op, q);
  check_dtype(op, k, q.dtype);
  check_dtype(op, v, q.dtype);
  check_shape(op, q, {-1, -1, -1});
  const std::int64_t rows = q.shape[0], heads = q.shape[1], head_dim = q.shape[2];
  check_shape(op, k, {-1, -1, head_dim});
  const std::int64_t keys = k.shape[0], kv_heads = k.shape[1];
  check_shape(op, v, {keys, kv_heads, -1});
  const std::int64_t v_head_dim = v.shape[2];
  check_ranges(op, q_ranges, rows);
  check_ranges(op, k_ranges, keys);
  check_head_map(op, kv_head_of_q, heads, kv_heads);
  for (const TensorView* view : {&row_max, &row_sum, &out}) {
    check_dtype(op, *view, DType::kFloat32);
  }
  check_shape(op, row_max, {rows, heads});
  check_shape(op, row_sum, {rows, heads});
  check_shape(op, out, {rows, heads, v_head_dim});
  check_at_least(op, "window", window, 0);
  if (!std::isfinite(scale)) fail(op, "scale", "a finite number", std::to_string(scale));
  if (!(softcap >= 0.0F) || std::isinf(softcap)) {
    fail(op, "softcap", "0 (none) or a positive number", std::to_string(softcap));
  }
  check_buffer(op, workspace,
               attention_workspace_bytes(head_dim, v_head_dim, q.dtype, threads, isa));
  if (rows == 0 || keys == 0) return;
  const AttendArgs args{q.dtype,
                        heads,
                        head_dim,
                        v_head_dim,
                        kv_heads,
                        q.data,
                        k.data,
                        v.data,
                        q.stride[0],
                        q.stride[1],
                        k.stride[0],
                        k.stride[1],
                        v.stride[0],
                        v.stride[1],
                        static_cast<const TokenRange*>(q_ranges.data),
                        static_cast<const TokenRange*>(k_ranges.data),
                        q_ranges.shape[0],
                        k_ranges.shape[0],
                        static_cast<float*>(row_max.data),
                        static_cast<float*>(row_sum.data),
                        static_cast<float*>(out.data),
                        row_max.stride[0],
                        row_sum.stride[0],
                        out.stride[0],
                        out.stride[1],
                        static_cast<const std::int32_t*>(kv_head_of_q.data),
                        scale,
                        causal,
                        window,
                        softcap,
                        workspace.data,
                        threads};
  PYMPA_SELECT_KERNELS(isa, attention_kernels).attend_block(args);
}

void merge(const TensorView& row_max, const TensorView& row_sum, const TensorView& out,
           const TensorView& other_row_max, const TensorView& other_row_sum,
           const TensorView& other_out, int threads, Isa isa) {
  const char* op = "merge";
  check_at_least(op, "threads", threads, 1);
  check_shape(op, out, {-1, -1, -1});
  const MergeArgs args{out.shape[0] * out.shape[1], out.shape[2],
                       contiguous_state(op, row_max, row_sum, out, out),
                       contiguous_state(op, other_row_max, other_row_sum, other_out, out), threads};
  PYMPA_SELECT_KERNELS(isa, attention_state_kernels).merge(args);
}

void finish(const TensorView& row_max, const TensorView& row_sum, const TensorView& out,
            const TensorView& o, const TensorView& lse, int threads, Isa isa) {
  const char* op = "finish";
  check_at_least(op, "threads", threads, 1);
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
                        threads};
  PYMPA_SELECT_KERNELS(isa, attention_state_kernels).finish(args);
}

}  // namespace pympa
