// Matrix products on the GPU, by cuBLASLt (gemm_cublaslt.cpp), or by plain loops under emulation
// (emulated/gemm.cpp).
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.hpp"

namespace pympa::cuda {

// out [m, n] = round(act(x [m, k] weight [n, k]^T + bias [n])), sums in float32; rows are `stride`
// elements apart. m, n and k are at least 1. Weight, bias and out start at multiples of 16 bytes,
// and so do the rows of weight and out.
struct GemmArgs {
  std::int64_t m, n, k;
  DType dtype;      // of x and weight
  DType out_dtype;  // `dtype` or float32
  const void* x;
  std::int64_t x_stride;
  const void* weight;
  std::int64_t weight_stride;
  const void* bias;  // dtype out_dtype, which is `dtype` then; null if none
  bool gelu;         // act is GELU by tanh, else nothing; out_dtype is 16-bit then
  void* out;
  std::int64_t out_stride;
  void* stream;
};

// A row's bits depend on the row, the weight, and what all rows share: n, k, dtypes, bias and act,
// and whether the rows of x all start at multiples of 16 bytes.
void gemm(const GemmArgs& args);

// Loads what gemm needs before its first call: the library that the process has loaded already, or
// that the system's loader finds, or the one in `directory`. Returns its version (0 for plain
// loops). Throws std::runtime_error if there is none.
std::int64_t load_gemm(const std::string& directory);

}  // namespace pympa::cuda
