// The choice of a row's experts by their logits, and the weights of the chosen ones.
#pragma once

#include <cstdint>

#include "core/dispatch.hpp"

namespace pympa {

struct TensorView;

enum class ScoreKind { kSoftmax, kSigmoid };
enum class GroupScore { kLargest, kTop2 };

// The most experts where others than those with the largest logits are chosen: their ranks lie on a
// thread's stack, or in a GPU's shared memory.
constexpr std::int64_t kMostRanked = 2048;

struct SelectArgs {
  std::int64_t rows, experts, chosen;
  const float* logits;
  std::int64_t logits_stride;
  std::int32_t* ids;
  std::int64_t ids_stride;
  float* weights;
  std::int64_t weights_stride;
  bool renormalize;
  ScoreKind score;
  const float* choice_bias;  // [experts], null if none
  std::int64_t groups, top_groups;
  GroupScore group_score;
  bool by_logits;      // logits rank experts as they are: a softmax keeps their order
  bool limits_groups;  // some groups are left out
  bool is_plain;       // the experts with the largest logits are chosen
  float least_sum;     // is added to the sum by which weights are divided
  float scale;
  Execution on;
};

struct SelectKernels {
  std::int64_t (*select_experts)(const SelectArgs& args);
};

PYMPA_DECLARE_FLOAT_KERNELS(SelectKernels, select_kernels)

// How a row chooses (DeepSeek-V2, arXiv 2405.04434, and V3, arXiv 2412.19437).
struct RoutingRule {
  ScoreKind score;
  std::int64_t groups, top_groups;  // of consecutive experts, and those of a row
  GroupScore group_score;
  double scale;                   // of weights
  const TensorView* choice_bias;  // float32 [experts], null if none
};

// The experts with the largest score + choice_bias of the best groups, ties to the lower id or
// group, by ascending id. Returns the first row with a logit that is not finite, or -1.
std::int64_t select_experts(const TensorView& logits, const TensorView& experts,
                            const TensorView& weights, bool renormalize, const RoutingRule& rule,
                            const Execution& on);

}  // namespace pympa
