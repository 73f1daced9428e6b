#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "ops/embedding.hpp"

namespace pympa::bindings {

namespace {

void bind_embed(const py::array& ids, const py::array& table, std::int64_t first_row,
                const py::array& out, int threads, const std::string& isa) {
  const char* op = "embed";
  const TensorView ids_view = input(op, "ids", ids);
  const TensorView table_view = input(op, "table", table);
  const TensorView out_view = output(op, "out", out);
  const Isa chosen = parse_isa(op, isa);
  py::gil_scoped_release release;
  embed(ids_view, table_view, first_row, out_view, threads, chosen);
}

}  // namespace

void register_embedding(py::module_& module) {
  module.def("embed", &bind_embed, py::arg("ids"), py::arg("table"), py::arg("first_row"),
             py::arg("out"), py::arg("threads"), py::arg("isa"));
}

}  // namespace pympa::bindings
