#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "core/check.hpp"
#include "ops/attention.hpp"

namespace pympa::bindings {

namespace {

void bind_attend_block(const Array& q, const Array& k, const Array& v, const py::array& q_ranges,
                       const py::array& k_ranges, const Array& row_max, const Array& row_sum,
                       const Array& out, const py::array& kv_head_of_q, double scale, bool causal,
                       std::int64_t window, double softcap, bool decode, const Array& workspace,
                       const Execution& on) {
  const char* op = "attend_block";
  const AttentionRule rule = attention_rule(op, scale, causal, window, softcap);
  const TensorView q_view = input(op, "q", q);
  const TensorView k_view = input(op, "k", k);
  const TensorView v_view = input(op, "v", v);
  const TensorView q_ranges_view = host_input(op, "q_ranges", q_ranges);
  const TensorView k_ranges_view = host_input(op, "k_ranges", k_ranges);
  const TensorView row_max_view = output(op, "row_max", row_max);
  const TensorView row_sum_view = output(op, "row_sum", row_sum);
  const TensorView out_view = output(op, "out", out);
  const TensorView map_view = host_input(op, "kv_head_of_q", kv_head_of_q);
  const TensorView workspace_view = output(op, "workspace", workspace);
  py::gil_scoped_release release;
  attend_block(q_view, k_view, v_view, q_ranges_view, k_ranges_view, row_max_view, row_sum_view,
               out_view, map_view, rule, decode, workspace_view, on);
}

void bind_score_tile(const Array& q, const Array& k, const py::array& kv_head_of_q,
                     const Array& scores, const Array& workspace, const Execution& on) {
  const char* op = "score_tile";
  const TensorView q_view = input(op, "q", q);
  const TensorView k_view = input(op, "k", k);
  const TensorView map_view = host_input(op, "kv_head_of_q", kv_head_of_q);
  const TensorView scores_view = output(op, "scores", scores);
  const TensorView workspace_view = output(op, "workspace", workspace);
  py::gil_scoped_release release;
  score_tile(q_view, k_view, map_view, scores_view, workspace_view, on);
}

void bind_fold_tile(const Array& scores, const Array& v, const py::array& kv_head_of_q,
                    std::int64_t q_start, std::int64_t k_start, const Array& row_max,
                    const Array& row_sum, const Array& out, double scale, bool causal,
                    std::int64_t window, double softcap, const Array& workspace,
                    const Execution& on) {
  const char* op = "fold_tile";
  const AttentionRule rule = attention_rule(op, scale, causal, window, softcap);
  const TensorView scores_view = input(op, "scores", scores);
  const TensorView v_view = input(op, "v", v);
  const TensorView map_view = host_input(op, "kv_head_of_q", kv_head_of_q);
  const TensorView row_max_view = output(op, "row_max", row_max);
  const TensorView row_sum_view = output(op, "row_sum", row_sum);
  const TensorView out_view = output(op, "out", out);
  const TensorView workspace_view = output(op, "workspace", workspace);
  py::gil_scoped_release release;
  fold_tile(scores_view, v_view, map_view, q_start, k_start, row_max_view, row_sum_view, out_view,
            rule, workspace_view, on);
}

void bind_start_state(const Array& row_max, const Array& row_sum, const Array& out,
                      const Optional& sinks, const Execution& on) {
  const char* op = "start_state";
  const TensorView row_max_view = output(op, "row_max", row_max);
  const TensorView row_sum_view = output(op, "row_sum", row_sum);
  const TensorView out_view = output(op, "out", out);
  const OptionalView sinks_view(op, "sinks", sinks);
  py::gil_scoped_release release;
  start_state(row_max_view, row_sum_view, out_view, sinks_view.get(), on);
}

void bind_merge(const Array& row_max, const Array& row_sum, const Array& out,
                const Array& other_row_max, const Array& other_row_sum, const Array& other_out,
                const Execution& on) {
  const char* op = "merge";
  const TensorView row_max_view = output(op, "row_max", row_max);
  const TensorView row_sum_view = output(op, "row_sum", row_sum);
  const TensorView out_view = output(op, "out", out);
  const TensorView other_max_view = input(op, "other_row_max", other_row_max);
  const TensorView other_sum_view = input(op, "other_row_sum", other_row_sum);
  const TensorView other_out_view = input(op, "other_out", other_out);
  py::gil_scoped_release release;
  merge(row_max_view, row_sum_view, out_view, other_max_view, other_sum_view, other_out_view, on);
}

void bind_finish(const Array& row_max, const Array& row_sum, const Array& out, const Array& o,
                 const Array& lse, const Execution& on) {
  const char* op = "finish";
  const TensorView row_max_view = input(op, "row_max", row_max);
  const TensorView row_sum_view = input(op, "row_sum", row_sum);
  const TensorView out_view = input(op, "out", out);
  const TensorView o_view = output(op, "o", o);
  const TensorView lse_view = output(op, "lse", lse);
  py::gil_scoped_release release;
  finish(row_max_view, row_sum_view, out_view, o_view, lse_view, on);
}

}  // namespace

void register_attention(py::module_& module) {
  module.def(
      "attention_workspace_bytes",
      [](std::int64_t head_dim, std::int64_t v_head_dim, const std::string& dtype,
         const Execution& on) {
        const char* op = "attention_workspace_bytes";
        return attention_workspace_bytes(head_dim, v_head_dim, parse_float_dtype(op, dtype), on);
      },
      py::arg("head_dim"), py::arg("v_head_dim"), py::arg("dtype"), py::arg("on"));
  module.def(
      "range_workspace_bytes",
      [](std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t v_head_dim,
         const std::string& dtype, const py::array& q_ranges, const py::array& k_ranges,
         bool decode, const Execution& on) {
        const char* op = "range_workspace_bytes";
        return range_workspace_bytes(
            heads, kv_heads, head_dim, v_head_dim, parse_float_dtype(op, dtype),
            host_input(op, "q_ranges", q_ranges), host_input(op, "k_ranges", k_ranges), decode, on);
      },
      py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("v_head_dim"),
      py::arg("dtype"), py::arg("q_ranges"), py::arg("k_ranges"), py::arg("decode"), py::arg("on"));
  module.def("attend_block", &bind_attend_block, py::arg("q"), py::arg("k"), py::arg("v"),
             py::arg("q_ranges"), py::arg("k_ranges"), py::arg("row_max"), py::arg("row_sum"),
             py::arg("out"), py::arg("kv_head_of_q"), py::arg("scale"), py::arg("causal"),
             py::arg("window"), py::arg("softcap"), py::arg("decode"), py::arg("workspace"),
             py::arg("on"));
  module.def("score_tile", &bind_score_tile, py::arg("q"), py::arg("k"), py::arg("kv_head_of_q"),
             py::arg("scores"), py::arg("workspace"), py::arg("on"));
  module.def("fold_tile", &bind_fold_tile, py::arg("scores"), py::arg("v"), py::arg("kv_head_of_q"),
             py::arg("q_start"), py::arg("k_start"), py::arg("row_max"), py::arg("row_sum"),
             py::arg("out"), py::arg("scale"), py::arg("causal"), py::arg("window"),
             py::arg("softcap"), py::arg("workspace"), py::arg("on"));
  module.def("start_state", &bind_start_state, py::arg("row_max"), py::arg("row_sum"),
             py::arg("out"), py::arg("sinks").none(true), py::arg("on"));
  module.def("merge", &bind_merge, py::arg("row_max"), py::arg("row_sum"), py::arg("out"),
             py::arg("other_row_max"), py::arg("other_row_sum"), py::arg("other_out"),
             py::arg("on"));
  module.def("finish", &bind_finish, py::arg("row_max"), py::arg("row_sum"), py::arg("out"),
             py::arg("o"), py::arg("lse"), py::arg("on"));
}

}  // namespace pympa::bindings
