// What only the modules of CUDA kernels have: where their matrix products come from.
#include "bindings/register.hpp"
#include "cuda/gemm.hpp"

namespace pympa::bindings {

void register_cuda(pybind11::module_& module) {
  module.def("load_gemm", &cuda::load_gemm, pybind11::arg("directory"));
}

}  // namespace pympa::bindings
