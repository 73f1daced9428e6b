// Functions of the GPU modules alone: copies, and loading the library of matrix products.
#include "bindings/array.hpp"
#include "bindings/register.hpp"
#include "cuda/gemm.hpp"
#include "cuda/runtime.hpp"
#include "ops/copy.hpp"

namespace pympa::bindings {

namespace {

void bind_copy(const Array& source, const Array& out, const Execution& on) {
  const char* op = "copy";
  const TensorView source_view = input(op, "source", source);
  const TensorView out_view = output(op, "out", out);
  py::gil_scoped_release release;
  copy(source_view, out_view, on);
}

std::int64_t bind_load_gemm(const std::string& directory) {
  py::gil_scoped_release release;
  return cuda::load_gemm(directory);
}

}  // namespace

void register_cuda(py::module_& module) {
  module.def("copy", &bind_copy, py::arg("source"), py::arg("out"), py::arg("on"));
  module.def("load_gemm", &bind_load_gemm, py::arg("directory"));
#if defined(PYMPA_CUDA_EMULATED)
  module.def(
      "set_shared_memory", [](int bytes) { cuda::emulated::most_shared_bytes = bytes; },
      py::arg("bytes"));
#endif
}

}  // namespace pympa::bindings
