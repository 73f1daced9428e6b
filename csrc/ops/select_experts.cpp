#include "ops/select_experts.hpp"

#include "core/check.hpp"

namespace pympa {

namespace {

constexpr float kLeastSum = 1e-20F;  // of sigmoids, as in DeepSeek-V3: all of them may vanish

void set_rule(const char* op, SelectArgs& args, const RoutingRule& rule) {
  const std::string of_experts = std::to_string(args.experts) + " (columns of logits)";
  if (rule.groups < 1 || args.experts % rule.groups != 0) {
    fail(op, "groups", "a divisor of " + of_experts, std::to_string(rule.groups));
  }
  if (rule.top_groups < 1 || rule.top_groups > rule.groups) {
    fail(op, "top_groups", "1 to " + std::to_string(rule.groups) + " (groups)",
         std::to_string(rule.top_groups));
  }
  if (rule.group_score == GroupScore::kTop2 && args.experts / rule.groups < 2) {
    fail(op, "group_score", "largest with groups of one expert", "top2");
  }
  if (rule.choice_bias) {
    check_dtype(op, *rule.choice_bias, DType::kFloat32);
    check_shape(op, *rule.choice_bias, {args.experts});
    args.choice_bias = static_cast<const float*>(rule.choice_bias->data);
  }
  args.score = rule.score;
  args.groups = rule.groups;
  args.top_groups = rule.top_groups;
  args.group_score = rule.group_score;
  args.by_logits = rule.score == ScoreKind::kSoftmax && !rule.choice_bias &&
                   rule.group_score == GroupScore::kLargest;
  args.limits_groups = rule.top_groups < rule.groups;
  args.is_plain = args.by_logits && !args.limits_groups;
  args.least_sum = rule.score == ScoreKind::kSigmoid ? kLeastSum : 0.0F;
  args.scale = check_range(op, "scale", rule.scale, kLeastNormal, kMostFactor);
  if (!args.is_plain && args.experts > kMostRanked) {
    fail(op, "logits", "at most " + std::to_string(kMostRanked) + " columns with this routing",
         std::to_string(args.experts));
  }
}

}  // namespace

std::int64_t select_experts(const TensorView& logits, const TensorView& experts,
                            const TensorView& weights, bool renormalize, const RoutingRule& rule,
                            const Execution& on) {
  const char* op = "select_experts";
  check_dtype(op, logits, DType::kFloat32);
  check_shape(op, logits, {-1, -1});
  SelectArgs args{};
  args.rows = logits.shape[0];
  args.experts = logits.shape[1];
  set_rule(op, args, rule);
  check_dtype(op, experts, DType::kInt32);
  check_shape(op, experts, {args.rows, -1});
  args.chosen = experts.shape[1];
  const std::int64_t most = args.experts / args.groups * args.top_groups;
  if (args.chosen < 1 || args.chosen > most) {
    fail(op, experts.name, "1 to " + std::to_string(most) + " columns",
         std::to_string(args.chosen));
  }
  check_dtype(op, weights, DType::kFloat32);
  check_shape(op, weights, {args.rows, args.chosen});
  args.logits = static_cast<const float*>(logits.data);
  args.logits_stride = logits.stride[0];
  args.ids = static_cast<std::int32_t*>(experts.data);
  args.ids_stride = experts.stride[0];
  args.weights = static_cast<float*>(weights.data);
  args.weights_stride = weights.stride[0];
  args.renormalize = renormalize;
  args.on = on;
  return PYMPA_SELECT_KERNELS(on.isa, select_kernels).select_experts(args);
}

}  // namespace pympa
