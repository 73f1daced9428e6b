#include "bindings/register.hpp"

PYBIND11_MODULE(_core, module) {
  module.doc() = "CPU kernels of pympa; pympa/_core.pyi documents each function.";
  using namespace pympa::bindings;
  register_isa(module);
  register_linear(module);
  register_attention(module);
  register_norm(module);
  register_rope(module);
  register_gather(module);
  register_experts(module);
  register_elementwise(module);
  register_peak(module);
}
