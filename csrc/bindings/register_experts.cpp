#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "core/check.hpp"
#include "ops/experts.hpp"
#include "ops/select_experts.hpp"

namespace pympa::bindings {

namespace {

ScoreKind parse_score(const char* op, const std::string& name) {
  if (name == "softmax") return ScoreKind::kSoftmax;
  if (name == "sigmoid") return ScoreKind::kSigmoid;
  fail(op, "score", "softmax or sigmoid", "'" + name + "'");
}

GroupScore parse_group_score(const char* op, const std::string& name) {
  if (name == "largest") return GroupScore::kLargest;
  if (name == "top2") return GroupScore::kTop2;
  fail(op, "group_score", "largest or top2", "'" + name + "'");
}

std::int64_t bind_select_experts(const Array& logits, const Array& experts, const Array& weights,
                                 bool renormalize, const std::string& score, std::int64_t groups,
                                 std::int64_t top_groups, const std::string& group_score,
                                 double scale, const Optional& choice_bias, const Execution& on) {
  const char* op = "select_experts";
  const TensorView logits_view = input(op, "logits", logits);
  const TensorView experts_view = output(op, "experts", experts);
  const TensorView weights_view = output(op, "weights", weights);
  const OptionalView choice_bias_view(op, "choice_bias", choice_bias);
  const RoutingRule rule{
      parse_score(op, score), groups, top_groups, parse_group_score(op, group_score), scale,
      choice_bias_view.get()};
  py::gil_scoped_release release;
  return select_experts(logits_view, experts_view, weights_view, renormalize, rule, on);
}

void bind_sort_rows(const Array& experts, const py::array& counts, const Array& sources,
                    const Array& inverse, const Execution& on) {
  const char* op = "sort_rows";
  const TensorView experts_view = input(op, "experts", experts);
  const TensorView counts_view = host_output(op, "counts", counts);
  const TensorView sources_view = output(op, "sources", sources);
  const TensorView inverse_view = output(op, "inverse", inverse);
  py::gil_scoped_release release;
  sort_rows(experts_view, counts_view, sources_view, inverse_view, on);
}

void bind_count_experts(const Array& experts, const py::array& segment_rows,
                        const py::array& counts, const Execution& on) {
  const char* op = "count_experts";
  const TensorView experts_view = input(op, "experts", experts);
  const TensorView segment_rows_view = host_input(op, "segment_rows", segment_rows);
  const TensorView counts_view = host_output(op, "counts", counts);
  py::gil_scoped_release release;
  count_experts(experts_view, segment_rows_view, counts_view, on);
}

void bind_drop_overflow(const Array& experts, const py::array& segment_rows, const py::array& used,
                        const py::array& capacity, const Execution& on) {
  const char* op = "drop_overflow";
  const TensorView experts_view = output(op, "experts", experts);
  const TensorView segment_rows_view = host_input(op, "segment_rows", segment_rows);
  const TensorView used_view = host_output(op, "used", used);
  const TensorView capacity_view = host_input(op, "capacity", capacity);
  py::gil_scoped_release release;
  drop_overflow(experts_view, segment_rows_view, used_view, capacity_view, on);
}

void bind_combine_rows(const Array& rows, const Array& inverse, const Array& weights,
                       const Optional& base, const Optional& base_gate, const Array& out,
                       const Execution& on) {
  const char* op = "combine_rows";
  const TensorView rows_view = input(op, "rows", rows);
  const TensorView inverse_view = input(op, "inverse", inverse);
  const TensorView weights_view = input(op, "weights", weights);
  const OptionalView base_view(op, "base", base);
  const OptionalView base_gate_view(op, "base_gate", base_gate);
  const TensorView out_view = output(op, "out", out);
  py::gil_scoped_release release;
  combine_rows(rows_view, inverse_view, weights_view, base_view.get(), base_gate_view.get(),
               out_view, on);
}

}  // namespace

void register_experts(py::module_& module) {
  module.def("select_experts", &bind_select_experts, py::arg("logits"), py::arg("experts"),
             py::arg("weights"), py::arg("renormalize"), py::arg("score"), py::arg("groups"),
             py::arg("top_groups"), py::arg("group_score"), py::arg("scale"),
             py::arg("choice_bias").none(true), py::arg("on"));
  module.def("sort_rows", &bind_sort_rows, py::arg("experts"), py::arg("counts"),
             py::arg("sources"), py::arg("inverse"), py::arg("on"));
  module.def("count_experts", &bind_count_experts, py::arg("experts"), py::arg("segment_rows"),
             py::arg("counts"), py::arg("on"));
  module.def("drop_overflow", &bind_drop_overflow, py::arg("experts"), py::arg("segment_rows"),
             py::arg("used"), py::arg("capacity"), py::arg("on"));
  module.def("combine_rows", &bind_combine_rows, py::arg("rows"), py::arg("inverse"),
             py::arg("weights"), py::arg("base").none(true), py::arg("base_gate").none(true),
             py::arg("out"), py::arg("on"));
}

}  // namespace pympa::bindings
