#include "bindings/register.hpp"

// Compiled once for each module: _core with the CPU kernels, _cuda with the GPU kernels.
PYBIND11_MODULE(PYMPA_MODULE, module) {
  module.doc() = "Kernels of pympa; pympa/_core.pyi and pympa/_stubs document each function.";
  using namespace pympa::bindings;
  register_execution(module);
  register_linear(module);
  register_attention(module);
  register_norm(module);
  register_rope(module);
  register_gather(module);
  register_experts(module);
  register_elementwise(module);
#if defined(PYMPA_CUDA_KERNELS)
  register_cuda(module);
#else
  register_cpu(module);
#endif
}
