#include <pybind11/pybind11.h>

#include "core/mpi_start.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_start, module) {
  module.doc() = "While MPI starts; pympa/_start.pyi documents it.";
  using pympa::MpiStart;
  module.def("unlink_shared_files", &pympa::unlink_shared_files);
  py::class_<MpiStart>(module, "MpiStart")
      .def(py::init<int, double, double>(), py::kw_only(), py::arg("task"),
           py::arg("grace_seconds"), py::arg("most_seconds"))
      .def("stop", &MpiStart::stop, py::call_guard<py::gil_scoped_release>());
}
