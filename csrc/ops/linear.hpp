// Linear layers on packed weights, with bias, activation, residual and gate fused after the sum.
#pragma once

#include <cstdint>

#include "core/dispatch.hpp"

namespace pympa {

struct TensorView;

// kSwigluClamped takes both sums of a gated layer: with g = min(gate, limit) and u = up within
// +-limit it is g sigmoid(alpha g) (u + 1).
enum class Activation { kNone, kGelu, kGeluTanh, kSilu, kSwigluClamped };

struct LinearArgs {
  std::int64_t m, n, k;
  DType dtype, out_dtype;
  const void* x;
  std::int64_t x_stride;
  // Rows in order: group_rows[0] of the first group, and so on; a plain layer is one group.
  std::int64_t groups;
  const std::int64_t* group_rows;
  const void* packed[2];         // [1] is the "up" weight of a gated layer, else null
  std::int64_t packed_bytes[2];  // from one group's weight to the next one's
  const void* bias[2];           // dtype `dtype`, null if none
  std::int64_t bias_stride[2];
  Activation activation;
  float limit, alpha;    // of kSwigluClamped
  const void* residual;  // dtype out_dtype, null if none
  std::int64_t residual_stride;
  void* branch;  // dtype out_dtype, null if none
  std::int64_t branch_stride;
  void* out;
  std::int64_t out_stride;
  void* workspace;
  Execution on;
};

struct MlpArgs {
  LinearArgs up;           // to the hidden state, which has no array, so no out
  LinearArgs down;         // from there: no x
  std::int64_t item_rows;  // at most so many share a pass over the weights, on one thread
};

struct PackWeightArgs {
  std::int64_t n, k;
  DType dtype;
  const void* weight;
  std::int64_t weight_stride;
  void* packed;
  Execution on;
};

struct LinearKernels {
  std::int64_t (*packed_bytes)(std::int64_t n, std::int64_t k, DType dtype);
  std::int64_t (*workspace_bytes)(std::int64_t m, std::int64_t n, DType dtype, bool gated,
                                  const Execution& on);
  void (*pack_weight)(const PackWeightArgs& args);
  void (*linear)(const LinearArgs& args);
};

struct MlpKernels {
  std::int64_t (*workspace_bytes)(std::int64_t item_rows, std::int64_t hidden, std::int64_t n,
                                  DType dtype, bool gated, const Execution& on);
  void (*mlp)(const MlpArgs& args);
};

PYMPA_DECLARE_KERNELS(LinearKernels, linear_kernels)
PYMPA_DECLARE_KERNELS(MlpKernels, mlp_kernels)

std::int64_t packed_weight_bytes(std::int64_t n, std::int64_t k, DType dtype, const Execution& on);

// Each thread writes panels in a row of their own, so that its memory node gets them.
void pack_weight(const TensorView& weight, const TensorView& packed, const Execution& on);

std::int64_t linear_workspace_bytes(std::int64_t m, std::int64_t n, std::int64_t k, DType dtype,
                                    bool gated, const Execution& on);

// branch = round(act(x W^T + bias)); out = round(residual + branch). With group_rows each group of
// consecutive rows has its own weight [groups, bytes] and bias [groups, n].
void linear(const TensorView& x, const TensorView& packed, const TensorView& out,
            const TensorView* bias, Activation activation, const TensorView* residual,
            const TensorView* branch, const TensorView* group_rows, const TensorView& workspace,
            const Execution& on);

// An activation, and the numbers that only kSwigluClamped has.
struct ActivationRule {
  Activation activation;
  double limit, alpha;
};

// out = round(act(x Wg^T + bg) * (x Wu^T + bu)); kSwigluClamped takes the two sums itself.
void gated_linear(const TensorView& x, const TensorView& packed_gate, const TensorView& packed_up,
                  const TensorView& out, const TensorView* bias_gate, const TensorView* bias_up,
                  const ActivationRule& rule, const TensorView* group_rows,
                  const TensorView& workspace, const Execution& on);

std::int64_t mlp_workspace_bytes(std::int64_t item_rows, std::int64_t hidden, std::int64_t n,
                                 DType dtype, bool gated, const Execution& on);

// Packed weights and biases (null if none) of an MLP with `hidden` columns between.
struct MlpWeights {
  const TensorView *gate, *up, *down;
  const TensorView *gate_bias, *up_bias, *bias;
  std::int64_t hidden;
  ActivationRule rule;
};

// linear, or gated_linear, and the linear after it, with their bits, but the hidden state between
// exists in parts of item_rows x 512 only. Changing item_rows changes memory and speed.
void mlp(const TensorView& x, const MlpWeights& weights, const TensorView& out,
         const TensorView* residual, const TensorView* branch, const TensorView* group_rows,
         std::int64_t item_rows, const TensorView& workspace, const Execution& on);

}  // namespace pympa
