#include <pybind11/stl.h>

#include "bindings/register.hpp"
#include "core/check.hpp"
#include "core/dispatch.hpp"

namespace pympa::bindings {

namespace {

namespace py = pybind11;

Execution make_execution(const std::string& isa, int threads, std::uintptr_t stream) {
  const char* op = "Execution";
  check_at_least(op, "threads", threads, 1);
  return {parse_isa(op, isa), threads, reinterpret_cast<void*>(stream)};
}

}  // namespace

void register_execution(py::module_& module) {
  module.def("supported_isas", &supported_isas);
  module.def("why_no_tiles", &why_no_tiles);
  // Each module has its own class, because a process may load several modules.
  py::class_<Execution>(module, "Execution", py::module_local())
      .def(py::init(&make_execution), py::arg("isa"), py::kw_only(), py::arg("threads") = 1,
           py::arg("stream") = 0);
}

}  // namespace pympa::bindings
