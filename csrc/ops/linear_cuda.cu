// Linear layers: products by gemm, and a separate kernel for what its epilogue cannot do.
//
//   fused:  x W^T + bias, GELU by tanh -> branch or out, rounded once
//           out = round(residual + branch)
//   else:   x W^T -> C float32 [rows, n] (gated: two)
//           epilogue(C) -> branch, out, rounded once
//
// The path depends only on arguments that all rows share, never on their number. Rows are processed
// in passes of kPassRows, which limit the workspace; each group of rows has its own weight.

#include "core/check.hpp"
#include "cuda/gemm.hpp"
#include "ops/copy.hpp"
#include "ops/elementwise.hpp"
#include "ops/linear_epilogue.hpp"

namespace pympa::cuda {

namespace {

constexpr std::int64_t kPassRows = 4096;  // enough tiles of 128 rows to fill any GPU
constexpr std::int64_t kAlignment = 256;
constexpr std::int64_t kFloat = sizeof(float);

std::int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The number of elements between rows of a packed weight, or of a buffer of the workspace.
std::int64_t padded(std::int64_t columns, std::int64_t element_bytes) {
  return round_up(columns, kAccessBytes / element_bytes);
}

// The bytes of one float32 C [rows, n], which are enough for a branch, too.
std::int64_t sums_bytes(std::int64_t m, std::int64_t n) {
  return (m < kPassRows ? m : kPassRows) * padded(n, kFloat) * kFloat;
}

std::int64_t workspace_bytes(std::int64_t m, std::int64_t n, DType, bool gated, const Execution&) {
  return (gated ? 2 : 1) * sums_bytes(m, n) + kAlignment;
}

std::int64_t packed_bytes(std::int64_t n, std::int64_t k, DType dtype) {
  return n * padded(k, size_of(dtype)) * size_of(dtype);
}

// Copies a weight, with zeros after each row up to the next multiple of 16 bytes.
template <class T>
__global__ void pack_weight_kernel(Rows<const T> weight, Rows<T> packed, std::int64_t n,
                                   std::int64_t k, bool aligned) {
  for_each_group<kGroup<T>>(
      n, k, aligned, [&]<bool kWhole>(std::int64_t row, std::int64_t column, std::int64_t left) {
        const Group<T> group = read<kWhole>(weight(row, column), left);
        *reinterpret_cast<Group<T>*>(packed(row, column)) = group;
      });
}

void check_packed(const char* op, const char* name, const void* packed, std::int64_t stride) {
  if (!is_aligned(Rows<const char>{static_cast<const char*>(packed), stride})) {
    fail(op, name, "an address that is a multiple of 16", "one that is not");
  }
}

void pack_weight_cuda(const PackWeightArgs& args) {
  check_packed("pack_weight", "packed", args.packed, 0);
  with_type(args.dtype, [&]<class T>() {
    const Rows<const T> weight{static_cast<const T*>(args.weight), args.weight_stride};
    const Rows<T> packed{static_cast<T*>(args.packed), padded(args.k, sizeof(T))};
    const auto [grid, block] = row_grid(args.n, ceil_div(args.k, kGroup<T>));
    launch(pack_weight_kernel<T>, grid, block, 0, args.on.stream, weight, packed, args.n, args.k,
           is_aligned(weight));
  });
}

// Some rows of one group, with their weight, bias and outputs.
class Pass {
 public:
  Pass(const LinearArgs& args, std::int64_t group, std::int64_t row, std::int64_t rows)
      : args_(args), group_(group), row_(row), rows_(rows) {
    const auto at = reinterpret_cast<std::uintptr_t>(args.workspace) + kAlignment - 1;
    workspace_ = reinterpret_cast<char*>(at / kAlignment * kAlignment);
  }

  void run() const {
    if (is_fused()) return fused();
    with_type(args_.dtype, [&]<class T>() {
      if (args_.out_dtype == args_.dtype) {
        unfused<T, T>();
      } else {
        unfused<T, float>();
      }
    });
  }

 private:
  const char* bias(int which) const {
    const char* bias = static_cast<const char*>(args_.bias[which]);
    return bias ? bias + group_ * args_.bias_stride[which] * size_of(args_.dtype) : nullptr;
  }

  // Returns row `row_` of an array of the output's dtype.
  template <class Void>
  Void* own(Void* at, std::int64_t stride) const {
    using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
    return at ? static_cast<Byte*>(at) + row_ * stride * size_of(args_.out_dtype) : nullptr;
  }

  // Whether gemm computes the branch: its epilogue has bias and GELU, and no more is requested.
  bool is_fused() const {
    const bool rounds_alike = args_.out_dtype == args_.dtype;
    const bool by_tanh =
        args_.activation == Activation::kGeluTanh && rounds_alike && args_.dtype != DType::kFloat32;
    const std::int64_t bias_bytes = args_.bias_stride[0] * size_of(args_.dtype);
    const bool takes_bias =
        !args_.bias[0] ||
        (rounds_alike && is_aligned(Rows<const char>{static_cast<const char*>(args_.bias[0]),
                                                     args_.groups > 1 ? bias_bytes : 0}));
    return !args_.packed[1] && args_.k > 0 && takes_bias &&
           (args_.activation == Activation::kNone || by_tanh) && (!args_.branch || args_.residual);
  }

  void multiply(int which, const void* bias, bool gelu, DType out_dtype, void* out,
                std::int64_t out_stride) const {
    const std::int64_t size = size_of(args_.dtype);
    gemm({rows_, args_.n, args_.k, args_.dtype, out_dtype,
          static_cast<const char*>(args_.x) + row_ * args_.x_stride * size, args_.x_stride,
          static_cast<const char*>(args_.packed[which]) + group_ * args_.packed_bytes[which],
          padded(args_.k, size), bias, gelu, out, out_stride, args_.on.stream});
  }

  // The product is written to its output if rows there are aligned, otherwise to the workspace
  // first, so that the library's algorithm does not depend on the address of the output.
  void fused() const {
    const std::int64_t size = size_of(args_.out_dtype);
    const auto [at, stride] =
        args_.residual ? std::pair{own(args_.branch, args_.branch_stride), args_.branch_stride}
                       : std::pair{own(args_.out, args_.out_stride), args_.out_stride};
    const bool is_direct = at && is_aligned(Rows<char>{static_cast<char*>(at), stride * size});
    void* product = is_direct ? at : workspace_;
    const std::int64_t product_stride = is_direct ? stride : padded(args_.n, size);
    multiply(0, bias(0), args_.activation == Activation::kGeluTanh, args_.out_dtype, product,
             product_stride);
    if (at && !is_direct) {
      copy_kernels.copy({{1, 1, rows_},
                         args_.n * size,
                         product,
                         {0, 0, product_stride * size},
                         at,
                         {0, 0, stride * size},
                         args_.on});
    }
    if (!args_.residual) return;
    elementwise_kernels.add({rows_, args_.n, args_.out_dtype,
                             own(args_.residual, args_.residual_stride), product,
                             args_.residual_stride, product_stride,
                             own(args_.out, args_.out_stride), args_.out_stride, args_.on});
  }

  template <class T, class Out>
  void unfused() const {
    Epilogue<T, Out> epilogue{};
    for (int which = 0; which < (args_.packed[1] ? 2 : 1); ++which) {
      epilogue.bias[which] = reinterpret_cast<const T*>(bias(which));
      if (args_.k == 0) continue;
      auto* c = reinterpret_cast<float*>(workspace_ + which * sums_bytes(args_.m, args_.n));
      epilogue.c[which] = {c, padded(args_.n, kFloat)};
      multiply(which, nullptr, false, DType::kFloat32, c, padded(args_.n, kFloat));
    }
    epilogue.activation = args_.activation;
    epilogue.limit = args_.limit;
    epilogue.alpha = args_.alpha;
    epilogue.gated = args_.packed[1] != nullptr;
    epilogue.residual = {static_cast<const Out*>(own(args_.residual, args_.residual_stride)),
                         args_.residual_stride};
    epilogue.branch = {static_cast<Out*>(own(args_.branch, args_.branch_stride)),
                       args_.branch_stride};
    epilogue.out = {static_cast<Out*>(own(args_.out, args_.out_stride)), args_.out_stride};
    epilogue.aligned = is_aligned(Rows<const T>{epilogue.bias[0], 0}) &&
                       is_aligned(Rows<const T>{epilogue.bias[1], 0}) &&
                       is_aligned(epilogue.residual) && is_aligned(epilogue.branch) &&
                       is_aligned(epilogue.out);
    const auto [grid, block] = row_grid(rows_, ceil_div(args_.n, kGroup<T>));
    launch(epilogue_kernel<T, Out>, grid, block, 0, args_.on.stream, epilogue, rows_, args_.n);
  }

  const LinearArgs& args_;
  std::int64_t group_, row_, rows_;
  char* workspace_;
};

void linear_cuda(const LinearArgs& args) {
  for (int which = 0; which < 2; ++which) {
    const std::int64_t stride = args.groups > 1 ? args.packed_bytes[which] : 0;
    check_packed("linear", "packed weight", args.packed[which], stride);
  }
  if (args.m > 0 && args.x_stride < args.k) {  // the library does not accept such a matrix
    fail("linear", "x", "rows of " + std::to_string(args.k) + " elements that do not overlap",
         "a row stride of " + std::to_string(args.x_stride));
  }
  if (args.n == 0) return;
  std::int64_t row = 0;
  for (std::int64_t group = 0; group < args.groups; ++group) {
    const std::int64_t last = row + args.group_rows[group];
    for (; row < last; row += kPassRows) {
      Pass(args, group, row, last - row < kPassRows ? last - row : kPassRows).run();
    }
    row = last;
  }
}

}  // namespace

const LinearKernels linear_kernels = {packed_bytes, workspace_bytes, pack_weight_cuda, linear_cuda};

}  // namespace pympa::cuda
