#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "ops/gather.hpp"

namespace pympa::bindings {

namespace {

void bind_gather_rows(const Array& source, const Array& index, const Array& out,
                      std::int64_t first_row, const Execution& on) {
  const char* op = "gather_rows";
  const TensorView source_view = input(op, "source", source);
  const TensorView index_view = input(op, "index", index);
  const TensorView out_view = output(op, "out", out);
  py::gil_scoped_release release;
  gather_rows(source_view, index_view, out_view, first_row, on);
}

}  // namespace

void register_gather(py::module_& module) {
  module.def("gather_rows", &bind_gather_rows, py::arg("source"), py::arg("index"), py::arg("out"),
             py::arg("first_row"), py::arg("on"));
}

}  // namespace pympa::bindings
