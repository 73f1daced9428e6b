// Linear layers on packed weights, with bias, activation, residual and gate fused behind the sum.
#pragma once

#include <cstdint>

#include "core/dispatch.hpp"

namespace pympa {

struct TensorView;

enum class Activation { kNone, kGelu, kGeluTanh, kSilu };

struct LinearArgs {
  std::int64_t m, n, k;
  DType dtype, out_dtype;
  const void* x;
  std::int64_t x_stride;
  const void* packed[2];  // [1] is the "up" weight of a gated layer, else null
  const void* bias[2];    // dtype `dtype`, null if none
  Activation activation;
  const void* residual;  // dtype out_dtype, null if none
  std::int64_t residual_stride;
  void* branch;  // dtype out_dtype, null if none
  std::int64_t branch_stride;
  void* out;
  std::int64_t out_stride;
  void* workspace;
  int threads;
};

struct PackWeightArgs {
  std::int64_t n, k;
  DType dtype;
  const void* weight;
  std::int64_t weight_stride;
  void* packed;
};

struct LinearKernels {
  std::int64_t (*packed_bytes)(std::int64_t n, std::int64_t k, DType dtype);
  std::int64_t (*workspace_bytes)(std::int64_t m, std::int64_t n, bool gated, int threads);
  void (*pack_weight)(const PackWeightArgs& args);
  void (*linear)(const LinearArgs& args);
};

PYMPA_DECLARE_KERNELS(LinearKernels, linear_kernels)

std::int64_t packed_weight_bytes(std::int64_t n, std::int64_t k, DType dtype, Isa isa);

void pack_weight(const TensorView& weight, const TensorView& packed, Isa isa);

std::int64_t linear_workspace_bytes(std::int64_t m, std::int64_t n, std::int64_t k, DType dtype,
                                    bool gated, int threads, Isa isa);

// branch = round(act(x W^T + bias)); out = round(residual + branch).
void linear(const TensorView& x, const TensorView& packed, const TensorView& out,
            const TensorView* bias, Activation activation, const TensorView* residual,
            const TensorView* branch, const TensorView& workspace, int threads, Isa isa);

// out = round(act(x Wg^T + bg) * (x Wu^T + bu)).
void gated_linear(const TensorView& x, const TensorView& packed_gate, const TensorView& packed_up,
                  const TensorView& out, const TensorView* bias_gate, const TensorView* bias_up,
                  Activation activation, const TensorView& workspace, int threads, Isa isa);

}  // namespace pympa
