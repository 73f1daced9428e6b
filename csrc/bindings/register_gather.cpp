#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "ops/gather.hpp"

namespace pympa::bindings {

namespace {

void bind_gather_rows(const py::array& source, const py::array& index, const py::array& out,
                      std::int64_t first_row, int threads, const std::string& isa) {
  const char* op = "gather_rows";
  const TensorView source_view = input(op, "source", source);
  const TensorView index_view = input(op, "index", index);
  const TensorView out_view = output(op, "out", out);
  const Isa chosen = parse_isa(op, isa);
  py::gil_scoped_release release;
  gather_rows(source_view, index_view, out_view, first_row, threads, chosen);
}

}  // namespace

void register_gather(py::module_& module) {
  module.def("gather_rows", &bind_gather_rows, py::arg("source"), py::arg("index"), py::arg("out"),
             py::arg("first_row"), py::arg("threads"), py::arg("isa"));
}

}  // namespace pympa::bindings
