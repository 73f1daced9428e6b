// The registrars that module.cpp calls, one for each op.
#pragma once

#include <pybind11/pybind11.h>

namespace pympa::bindings {

void register_execution(pybind11::module_& module);
void register_linear(pybind11::module_& module);
void register_attention(pybind11::module_& module);
void register_norm(pybind11::module_& module);
void register_rope(pybind11::module_& module);
void register_gather(pybind11::module_& module);
void register_experts(pybind11::module_& module);
void register_elementwise(pybind11::module_& module);
void register_cpu(pybind11::module_& module);
void register_cuda(pybind11::module_& module);

}  // namespace pympa::bindings
