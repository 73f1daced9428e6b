// Products by plain loops: each element is one float32 sum by ascending k.

#include "cuda/gemm.hpp"

#include <stdexcept>
#include <vector>

#include "cuda/convert.hpp"
#include "cuda/math.hpp"

namespace pympa::cuda {

namespace {

using Floats = std::vector<float>;

// [k, n], so that sums of neighbouring columns grow side by side.
template <class T>
Floats transposed_weight(const GemmArgs& args) {
  Floats result(static_cast<std::size_t>(args.n * args.k));
  for (std::int64_t column = 0; column < args.n; ++column) {
    const T* weight = static_cast<const T*>(args.weight) + column * args.weight_stride;
    for (std::int64_t i = 0; i < args.k; ++i) {
      result[static_cast<std::size_t>(i * args.n + column)] = to_float(weight[i]);
    }
  }
  return result;
}

template <class T, class Out>
void multiply(const GemmArgs& args) {
  const Floats weight = transposed_weight<T>(args);
  const auto n = static_cast<std::size_t>(args.n);
  Floats sums(n);
  for (std::int64_t row = 0; row < args.m; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    Out* out = static_cast<Out*>(args.out) + row * args.out_stride;
    sums.assign(n, 0.0F);
    for (std::int64_t i = 0; i < args.k; ++i) {
      const float factor = to_float(x[i]);
      const float* weights = weight.data() + i * args.n;
      for (std::size_t column = 0; column < n; ++column) sums[column] += factor * weights[column];
    }
    for (std::size_t column = 0; column < n; ++column) {
      float y = sums[column];
      if (args.bias) y += to_float(static_cast<const Out*>(args.bias)[column]);
      out[column] = from_float<Out>(args.gelu ? gelu_tanh(y) : y);
    }
  }
}

void check_aligned(const void* at, std::int64_t stride_bytes, const char* what) {
  if ((reinterpret_cast<std::uintptr_t>(at) | static_cast<std::uintptr_t>(stride_bytes)) % 16) {
    throw std::runtime_error(std::string("gemm: ") + what + " not at a multiple of 16 bytes");
  }
}

}  // namespace

void gemm(const GemmArgs& args) {
  if (args.m < 1 || args.n < 1 || args.k < 1) throw std::runtime_error("gemm: empty product");
  if (args.x_stride < args.k) throw std::runtime_error("gemm: rows of x overlap");
  with_type(args.dtype, [&]<class T>() {
    check_aligned(args.weight, args.weight_stride * static_cast<std::int64_t>(sizeof(T)), "weight");
    check_aligned(args.bias, 0, "bias");
    check_aligned(args.out, args.out_stride * (args.out_dtype == args.dtype ? sizeof(T) : 4),
                  "out");
    if (args.out_dtype == args.dtype) {
      multiply<T, T>(args);
    } else {
      multiply<T, float>(args);
    }
  });
}

std::int64_t load_gemm(const std::string&) { return 0; }

}  // namespace pympa::cuda
