#include "ops/attention.hpp"

#include <cmath>

#include "core/check.hpp"

namespace pympa {

namespace {

// Checks ranges [n, fields], contiguous.
template <class Range>
const Range* checked_ranges(const char* op, const TensorView& ranges) {
  constexpr std::int64_t kFields = sizeof(Range) / sizeof(std::int64_t);
  check_dtype(op, ranges, DType::kInt64);
  check_shape(op, ranges, {-1, kFields});
  if (ranges.shape[0] > 1 && ranges.stride[0] != kFields) {
    fail(op, ranges.name, "a contiguous array", "row stride " + std::to_string(ranges.stride[0]));
  }
  const Range* items = static_cast<const Range*>(ranges.data);
  for (std::int64_t i = 0; i < ranges.shape[0]; ++i) {
    check_at_least(op, "range start", items[i].start, 0);
    check_at_least(op, "range length", items[i].length, 0);
  }
  return items;
}

// Ranges of queries must cover `rows` rows exactly.
void check_query_ranges(const char* op, const TensorView& ranges, std::int64_t rows) {
  const TokenRange* items = checked_ranges<TokenRange>(op, ranges);
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < ranges.shape[0]; ++i) total += items[i].length;
  if (total != rows) {
    fail(op, ranges.name, "lengths that add up to " + std::to_string(rows) + " rows",
         std::to_string(total));
  }
}

// Ranges of keys must lie in `rows` rows.
void check_key_ranges(const char* op, const TensorView& ranges, std::int64_t rows) {
  const KeyRange* items = checked_ranges<KeyRange>(op, ranges);
  for (std::int64_t i = 0; i < ranges.shape[0]; ++i) {
    check_at_least(op, "first row", items[i].first_row, 0);
    if (items[i].first_row + items[i].length > rows) {
      fail(op, ranges.name, "rows in [0, " + std::to_string(rows) + ")",
           std::to_string(items[i].length) + " rows from " + std::to_string(items[i].first_row));
    }
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

// Keys from global position `start` on must end with their tile.
void check_tile(const char* op, std::int64_t start, std::int64_t keys) {
  const std::int64_t most = kKeyTile - start % kKeyTile;
  if (keys > most) {
    fail(op, "keys", "at most " + std::to_string(most) + " to the end of the tile",
         std::to_string(keys));
  }
}

void check_state(const char* op, const TensorView& row_max, const TensorView& row_sum,
                 const TensorView& out, std::int64_t rows, std::int64_t heads,
                 std::int64_t v_head_dim) {
  for (const TensorView* view : {&row_max, &row_sum, &out}) {
    check_dtype(op, *view, DType::kFloat32);
  }
  check_shape(op, row_max, {rows, heads});
  check_shape(op, row_sum, {rows, heads});
  check_shape(op, out, {rows, heads, v_head_dim});
}

void check_scores(const char* op, const TensorView& scores, std::int64_t rows, std::int64_t heads,
                  std::int64_t keys) {
  check_dtype(op, scores, DType::kFloat32);
  check_shape(op, scores, {rows, heads, keys});
}

template <class Data>
HeadRows<Data> head_rows(const TensorView& view) {
  return {static_cast<Data*>(view.data), view.stride[0], view.stride[1]};
}

}  // namespace

AttentionRule attention_rule(const char* op, double scale, bool causal, std::int64_t window,
                             double softcap) {
  check_at_least(op, "window", window, 0);
  check_float(op, "abs(scale)", std::abs(scale), kLeastNormal, kMostFactor);
  return {static_cast<float>(scale), causal, window,
          check_float(op, "softcap", softcap, kLeastSoftcap, kMostSoftcap)};
}

std::int64_t attention_workspace_bytes(std::int64_t head_dim, std::int64_t v_head_dim, DType dtype,
                                       const Execution& on) {
  const char* op = "attention_workspace_bytes";
  check_at_least(op, "head_dim", head_dim, 0);
  check_at_least(op, "v_head_dim", v_head_dim, 0);
  return PYMPA_SELECT_KERNELS(attention_isa(dtype, on.isa), attention_kernels)
      .workspace_bytes(head_dim, v_head_dim, dtype, on);
}

std::int64_t range_workspace_bytes(std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
                                   std::int64_t v_head_dim, DType dtype, const TensorView& q_ranges,
                                   const TensorView& k_ranges, bool decode, const Execution& on) {
  const char* op = "range_workspace_bytes";
  check_at_least(op, "heads", heads, 0);
  check_at_least(op, "kv_heads", kv_heads, 0);
  check_at_least(op, "head_dim", head_dim, 1);
  check_at_least(op, "v_head_dim", v_head_dim, 1);
  const AttendArgs args{.dtype = dtype,
                        .heads = heads,
                        .kv_heads = kv_heads,
                        .head_dim = head_dim,
                        .v_head_dim = v_head_dim,
                        .q_ranges = checked_ranges<TokenRange>(op, q_ranges),
                        .k_ranges = checked_ranges<KeyRange>(op, k_ranges),
                        .q_range_count = q_ranges.shape[0],
                        .k_range_count = k_ranges.shape[0],
                        .decode = decode,
                        .on = on};
  return PYMPA_SELECT_KERNELS(attention_isa(dtype, on.isa), attention_kernels)
      .range_workspace_bytes(args);
}

void attend_block(const TensorView& q, const TensorView& k, const TensorView& v,
                  const TensorView& q_ranges, const TensorView& k_ranges, const TensorView& row_max,
                  const TensorView& row_sum, const TensorView& out, const TensorView& kv_head_of_q,
                  const AttentionRule& rule, bool decode, const TensorView& workspace,
                  const Execution& on) {
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
  check_at_least(op, "head_dim", head_dim, 1);
  check_at_least(op, "v_head_dim", v_head_dim, 1);
  check_query_ranges(op, q_ranges, rows);
  check_key_ranges(op, k_ranges, keys);
  check_head_map(op, kv_head_of_q, heads, kv_heads);
  check_state(op, row_max, row_sum, out, rows, heads, v_head_dim);
  check_buffer(op, workspace,
               attention_workspace_bytes(head_dim, v_head_dim, q.dtype, on) +
                   range_workspace_bytes(heads, kv_heads, head_dim, v_head_dim, q.dtype, q_ranges,
                                         k_ranges, decode, on));
  if (rows == 0 || keys == 0) return;
  const AttendArgs args{.makes_scores = true,
                        .folds_scores = true,
                        .dtype = q.dtype,
                        .heads = heads,
                        .kv_heads = kv_heads,
                        .head_dim = head_dim,
                        .v_head_dim = v_head_dim,
                        .q = head_rows<const void>(q),
                        .k = head_rows<const void>(k),
                        .v = head_rows<const void>(v),
                        .q_ranges = static_cast<const TokenRange*>(q_ranges.data),
                        .k_ranges = static_cast<const KeyRange*>(k_ranges.data),
                        .q_range_count = q_ranges.shape[0],
                        .k_range_count = k_ranges.shape[0],
                        .row_max = head_rows<float>(row_max),
                        .row_sum = head_rows<float>(row_sum),
                        .out = head_rows<float>(out),
                        .kv_head_of_q = static_cast<const std::int32_t*>(kv_head_of_q.data),
                        .rule = rule,
                        .decode = decode,
                        .workspace = workspace.data,
                        .on = on};
  PYMPA_SELECT_KERNELS(attention_isa(args.dtype, on.isa), attention_kernels).attend(args);
}

void score_tile(const TensorView& q, const TensorView& k, const TensorView& kv_head_of_q,
                const TensorView& scores, const TensorView& workspace, const Execution& on) {
  const char* op = "score_tile";
  check_float_dtype(op, q);
  check_dtype(op, k, q.dtype);
  check_shape(op, q, {-1, -1, -1});
  const std::int64_t rows = q.shape[0], heads = q.shape[1], head_dim = q.shape[2];
  check_shape(op, k, {-1, -1, head_dim});
  const std::int64_t keys = k.shape[0], kv_heads = k.shape[1];
  check_at_least(op, "head_dim", head_dim, 1);
  check_tile(op, 0, keys);
  check_head_map(op, kv_head_of_q, heads, kv_heads);
  check_scores(op, scores, rows, heads, keys);
  check_buffer(op, workspace, attention_workspace_bytes(head_dim, 0, q.dtype, on));
  if (rows == 0 || keys == 0) return;
  const TokenRange q_range{0, 0, rows};
  const KeyRange k_range{0, 0, keys, 0};
  const AttendArgs args{.makes_scores = true,
                        .dtype = q.dtype,
                        .heads = heads,
                        .kv_heads = kv_heads,
                        .head_dim = head_dim,
                        .q = head_rows<const void>(q),
                        .k = head_rows<const void>(k),
                        .scores = head_rows<float>(scores),
                        .q_ranges = &q_range,
                        .k_ranges = &k_range,
                        .q_range_count = 1,
                        .k_range_count = 1,
                        .kv_head_of_q = static_cast<const std::int32_t*>(kv_head_of_q.data),
                        .workspace = workspace.data,
                        .on = on};
  PYMPA_SELECT_KERNELS(attention_isa(args.dtype, on.isa), attention_kernels).attend(args);
}

void fold_tile(const TensorView& scores, const TensorView& v, const TensorView& kv_head_of_q,
               std::int64_t q_start, std::int64_t k_start, const TensorView& row_max,
               const TensorView& row_sum, const TensorView& out, const AttentionRule& rule,
               const TensorView& workspace, const Execution& on) {
  const char* op = "fold_tile";
  check_float_dtype(op, v);
  check_shape(op, v, {-1, -1, -1});
  const std::int64_t keys = v.shape[0], kv_heads = v.shape[1], v_head_dim = v.shape[2];
  check_scores(op, scores, -1, -1, keys);
  const std::int64_t rows = scores.shape[0], heads = scores.shape[1];
  check_at_least(op, "v_head_dim", v_head_dim, 1);
  check_at_least(op, "q_start", q_start, 0);
  check_at_least(op, "k_start", k_start, 0);
  check_tile(op, k_start, keys);
  check_head_map(op, kv_head_of_q, heads, kv_heads);
  check_state(op, row_max, row_sum, out, rows, heads, v_head_dim);
  check_buffer(op, workspace, attention_workspace_bytes(0, v_head_dim, v.dtype, on));
  if (rows == 0 || keys == 0) return;
  const TokenRange q_range{0, q_start, rows};
  const KeyRange k_range{0, k_start, keys, 0};
  const AttendArgs args{.folds_scores = true,
                        .dtype = v.dtype,
                        .heads = heads,
                        .kv_heads = kv_heads,
                        .v_head_dim = v_head_dim,
                        .v = head_rows<const void>(v),
                        .scores = head_rows<float>(scores),
                        .q_ranges = &q_range,
                        .k_ranges = &k_range,
                        .q_range_count = 1,
                        .k_range_count = 1,
                        .row_max = head_rows<float>(row_max),
                        .row_sum = head_rows<float>(row_sum),
                        .out = head_rows<float>(out),
                        .kv_head_of_q = static_cast<const std::int32_t*>(kv_head_of_q.data),
                        .rule = rule,
                        .workspace = workspace.data,
                        .on = on};
  PYMPA_SELECT_KERNELS(attention_isa(args.dtype, on.isa), attention_kernels).attend(args);
}

}  // namespace pympa
