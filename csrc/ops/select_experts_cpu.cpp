// The choice of experts by logits [rows, experts]:
//
//   score = softmax(logits), or sigmoid ; rank = logit or score + choice bias
//   the best groups by their largest rank, or the sum of their two largest
//   the experts there with the largest ranks ; weight = score [/ sum over them] * scale

#include <mutex>

#include "cpu/convert.hpp"
#include "cpu/math.hpp"
#include "cpu/parallel.hpp"
#include "ops/select_experts.hpp"

namespace pympa::PYMPA_ISA {

namespace {

bool all_finite(const float* x, int64_t count) {
  V residue{};
  for (int64_t i = 0; i < count; i += W) {
    const V lanes = load(x + i, count - i);
    residue += lanes - lanes;  // 0, or NaN for what is not finite
  }
  return sum_lanes(residue) == 0.0f;
}

float largest(const float* x, int64_t count) {
  float result = x[0];
  for (int64_t i = 1; i < count; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

float sum_of_exp(const float* x, int64_t count, float shift) {
  V sums{};
  for (int64_t i = 0; i < count; i += W) {
    V p = exp(load(x + i, count - i) - splat(shift));
    if (count - i < W) p = lane_index() < static_cast<int>(count - i) ? p : V{};
    sums += p;
  }
  return sum_lanes(sums);
}

// ids and kept become the largest entries of x, ties to the lower id, by ascending id.
void keep_largest(const float* x, int64_t count, int64_t chosen, int32_t* ids, float* kept) {
  const auto insert = [&](int64_t at, int32_t id, float value, auto&& goes_before) {
    for (; at > 0 && goes_before(at - 1); --at) {
      ids[at] = ids[at - 1];
      kept[at] = kept[at - 1];
    }
    ids[at] = id;
    kept[at] = value;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (i >= chosen && !(x[i] > kept[chosen - 1])) continue;
    insert(min_of(i, chosen - 1), static_cast<int32_t>(i), x[i],
           [&](int64_t other) { return x[i] > kept[other]; });
  }
  for (int64_t i = 1; i < chosen; ++i) {
    const int32_t id = ids[i];
    insert(i, id, kept[i], [&](int64_t other) { return id < ids[other]; });
  }
}

// A softmax has exp(logit - shift) / sum.
struct ExpertScores {
  ScoreKind kind;
  float shift, sum;

  PYMPA_INLINE V of(V logits) const {
    if (kind == ScoreKind::kSigmoid) return sigmoid(logits);
    return exp(logits - splat(shift)) / splat(sum);
  }
};

ExpertScores scores_of_all(const SelectArgs& args, const float* x) {
  if (args.score == ScoreKind::kSigmoid) return {args.score, 0.0f, 1.0f};
  const float shift = largest(x, args.experts);
  return {args.score, shift, sum_of_exp(x, args.experts, shift)};
}

// By what experts are ranked.
void rank_experts(const SelectArgs& args, const float* x, float* ranks) {
  const bool by_logits = args.by_logits;
  const ExpertScores scores = by_logits ? ExpertScores{} : scores_of_all(args, x);
  for (int64_t i = 0; i < args.experts; i += W) {
    const int64_t count = args.experts - i;
    V rank = load(x + i, count);
    if (!by_logits) rank = scores.of(rank);
    if (args.choice_bias) rank += load(args.choice_bias + i, count);
    store(ranks + i, rank, count);
  }
}

float group_rank(const float* ranks, int64_t count, GroupScore score) {
  float first = -kInfinity, second = -kInfinity;
  for (int64_t i = 0; i < count; ++i) {
    const bool leads = ranks[i] > first;
    second = leads ? first : (ranks[i] > second ? ranks[i] : second);
    first = leads ? ranks[i] : first;
  }
  return score == GroupScore::kLargest ? first : first + second;
}

// Ranks of experts of all but the best groups become -inf.
void drop_groups(const SelectArgs& args, float* ranks) {
  const int64_t size = args.experts / args.groups;
  float of_group[kMostRanked];
  for (int64_t group = 0; group < args.groups; ++group) {
    of_group[group] = group_rank(ranks + group * size, size, args.group_score);
  }
  for (int64_t group = 0; group < args.groups; ++group) {
    int64_t better = 0;
    for (int64_t other = 0; other < args.groups; ++other) {
      better += of_group[other] > of_group[group] ||
                (of_group[other] == of_group[group] && other < group);
    }
    if (better < args.top_groups) continue;
    for (int64_t i = 0; i < size; ++i) ranks[group * size + i] = -kInfinity;
  }
}

// ids, and weights the logits of the chosen experts.
PYMPA_NOINLINE void choose_by_rank(const SelectArgs& args, const float* x, int32_t* ids,
                                   float* weights) {
  float ranks[kMostRanked];
  rank_experts(args, x, ranks);
  if (args.limits_groups) drop_groups(args, ranks);
  keep_largest(ranks, args.experts, args.chosen, ids, weights);
  for (int64_t i = 0; i < args.chosen; ++i) weights[i] = x[ids[i]];
}

// Scores of the chosen experts, whose logits are in `chosen`. Where the largest logit may not
// be among them, weights that will be divided by their sum are a softmax of the chosen logits
// alone: the others could leave nothing of them.
ExpertScores scores_of_chosen(const SelectArgs& args, const float* x, const float* chosen) {
  if (args.score == ScoreKind::kSigmoid) return {args.score, 0.0f, 1.0f};
  if (!args.is_plain && !args.renormalize) return scores_of_all(args, x);
  const float shift = largest(chosen, args.chosen);
  return {args.score, shift, args.is_plain ? sum_of_exp(x, args.experts, shift) : 1.0f};
}

void select_row(const SelectArgs& args, const float* x, int32_t* ids, float* weights) {
  if (args.is_plain) {
    keep_largest(x, args.experts, args.chosen, ids, weights);
  } else {
    choose_by_rank(args, x, ids, weights);
  }
  const ExpertScores scores = scores_of_chosen(args, x, weights);
  for (int64_t i = 0; i < args.chosen; i += W) {
    const int64_t count = args.chosen - i;
    store(weights + i, scores.of(load(weights + i, count)), count);
  }
  if (args.renormalize) {
    float total = 0.0f;
    for (int64_t i = 0; i < args.chosen; ++i) total += weights[i];
    total += args.least_sum;
    for (int64_t i = 0; i < args.chosen; ++i) weights[i] /= total;
  }
  if (args.scale == 1.0f) return;
  for (int64_t i = 0; i < args.chosen; ++i) weights[i] *= args.scale;
}

// The first row that is not finite, or -1. A choice bias is part of each row.
int64_t select_rows(const SelectArgs& args, int64_t first, int64_t last) {
  const bool finite_bias = !args.choice_bias || all_finite(args.choice_bias, args.experts);
  int64_t nonfinite = -1;
  for (int64_t row = first; row < last; ++row) {
    const float* x = args.logits + row * args.logits_stride;
    int32_t* ids = args.ids + row * args.ids_stride;
    float* weights = args.weights + row * args.weights_stride;
    if (finite_bias && all_finite(x, args.experts)) {
      select_row(args, x, ids, weights);
      continue;
    }
    if (nonfinite < 0) nonfinite = row;
    for (int64_t i = 0; i < args.chosen; ++i) {
      ids[i] = static_cast<int32_t>(i);
      weights[i] = 0.0f;
    }
  }
  return nonfinite;
}

int64_t select_experts_cpu(const SelectArgs& args) {
  int64_t nonfinite = -1;
  std::mutex guard;
  for_row_pieces(args.on.threads, args.rows, [&](int64_t first, int64_t last) {
    const int64_t found = select_rows(args, first, last);
    if (found < 0) return;
    const std::lock_guard<std::mutex> hold(guard);
    if (nonfinite < 0 || found < nonfinite) nonfinite = found;
  });
  return nonfinite;
}

}  // namespace

const SelectKernels select_kernels = {select_experts_cpu};

}  // namespace pympa::PYMPA_ISA
