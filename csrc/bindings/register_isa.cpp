#include <pybind11/stl.h>

#include "bindings/register.hpp"
#include "core/dispatch.hpp"

namespace pympa::bindings {

void register_isa(pybind11::module_& module) { module.def("supported_isas", &supported_isas); }

}  // namespace pympa::bindings
