#include "bindings/register.hpp"
#include "core/check.hpp"
#include "ops/peak.hpp"

namespace pympa::bindings {

namespace py = pybind11;

namespace {

double bind_fma_peak(const std::string& dtype, const std::string& isa, double seconds) {
  const char* op = "fma_peak";
  const DType chosen_dtype = parse_float_dtype(op, dtype);
  const Isa chosen = parse_isa(op, isa);
  py::gil_scoped_release release;
  return fma_peak(chosen_dtype, chosen, seconds);
}

double bind_read_bandwidth(std::int64_t bytes, double seconds) {
  py::gil_scoped_release release;
  return read_bandwidth(bytes, seconds);
}

}  // namespace

void register_peak(py::module_& module) {
  module.def("fma_peak", &bind_fma_peak, py::arg("dtype"), py::arg("isa"), py::arg("seconds"));
  module.def("read_bandwidth", &bind_read_bandwidth, py::arg("bytes"), py::arg("seconds"));
}

}  // namespace pympa::bindings
