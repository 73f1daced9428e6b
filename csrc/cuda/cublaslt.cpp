#include "cuda/cublaslt.hpp"

#include <dlfcn.h>

#include <stdexcept>

namespace pympa::cuda::cublaslt {

namespace {

constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

void* open(const std::string& directory) {
  for (const char* name : kNames) {
    if (void* opened = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return opened;
  }
  for (const char* name : kNames) {
    const std::string path = directory + "/" + name;
    if (void* opened = directory.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
      return opened;
    }
  }
  throw std::runtime_error(
      "cuBLASLt: expected libcublasLt.so.13 or .12 among loaded libraries, on the loader's path" +
      (directory.empty() ? std::string() : " or in " + directory) +
      ", found none; pip install 'pympa[cuda]' brings it");
}

template <class Function>
void find(void* opened, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(opened, name));
  if (!function) throw std::runtime_error(std::string("cuBLASLt: no function ") + name);
}

Library load(const std::string& directory) {
  void* opened = open(directory);  // stays open: kernels are under way until the process ends
  Library library{};
  find(opened, "cublasLtCreate", library.create);
  find(opened, "cublasLtGetStatusName", library.status_name);
  find(opened, "cublasLtGetVersion", library.version);
  find(opened, "cublasLtMatmulDescCreate", library.operation_create);
  find(opened, "cublasLtMatmulDescDestroy", library.operation_destroy);
  find(opened, "cublasLtMatmulDescSetAttribute", library.operation_set);
  find(opened, "cublasLtMatrixLayoutCreate", library.layout_create);
  find(opened, "cublasLtMatrixLayoutDestroy", library.layout_destroy);
  find(opened, "cublasLtMatmulPreferenceCreate", library.preference_create);
  find(opened, "cublasLtMatmulPreferenceDestroy", library.preference_destroy);
  find(opened, "cublasLtMatmulPreferenceSetAttribute", library.preference_set);
  find(opened, "cublasLtMatmulAlgoGetHeuristic", library.heuristic);
  find(opened, "cublasLtMatmulAlgoCheck", library.algorithm_check);
  find(opened, "cublasLtMatmulAlgoConfigGetAttribute", library.algorithm_get);
  find(opened, "cublasLtMatmul", library.multiply);
  return library;
}

}  // namespace

const Library& library(const std::string& directory) {
  static const Library loaded = load(directory);
  return loaded;
}

}  // namespace pympa::cuda::cublaslt
