// The choice of experts by logits [rows, experts]:
//
//   score = softmax(logits), or sigmoid ; rank = logit or score + choice bias
//   the best groups by their largest rank, or the sum of their two largest
//   the experts there with the largest ranks ; weight = score [/ sum over them] * scale
//
// One warp selects the experts of a row; it reads the logits from memory once, and from the cache
// `chosen` times. Ranks that are not logits lie in shared memory.

#include "cuda/mailbox.hpp"
#include "cuda/math.hpp"
#include "cuda/rows.hpp"
#include "cuda/warp.hpp"
#include "ops/select_experts.hpp"

namespace pympa::cuda {

namespace {

struct Candidate {
  float value;
  int id;

  __device__ __forceinline__ bool goes_before(Candidate other) const {
    return value > other.value || (value == other.value && id < other.id);
  }
};

__device__ __forceinline__ Candidate first_of_warp(Candidate mine) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) {
    const Candidate other{__shfl_xor_sync(~0U, mine.value, bits),
                          __shfl_xor_sync(~0U, mine.id, bits)};
    if (other.goes_before(mine)) mine = other;
  }
  return mine;
}

// The first candidate after `last`.
__device__ __forceinline__ Candidate next_candidate(const float* x, int count, Candidate last) {
  Candidate best{-INFINITY, count};
  for (int id = static_cast<int>(lane_index()); id < count; id += kWarp) {
    const Candidate one{x[id], id};
    if (last.goes_before(one) && one.goes_before(best)) best = one;
  }
  return first_of_warp(best);
}

__device__ __forceinline__ bool all_finite(const float* x, int experts) {
  bool finite = true;
  for (int id = static_cast<int>(lane_index()); id < experts; id += kWarp) {
    finite = finite && fabsf(x[id]) < INFINITY;
  }
  return __all_sync(~0U, finite);
}

// A softmax has exp(logit - shift) / sum.
struct ExpertScores {
  ScoreKind kind;
  float shift, sum;

  __device__ __forceinline__ float of(float logit) const {
    if (kind == ScoreKind::kSigmoid) return sigmoid(logit);
    return expf(logit - shift) / sum;
  }
};

__device__ __forceinline__ ExpertScores softmax_of(const float* x, int experts, float largest) {
  float sum = 0.0F;
  for (int id = static_cast<int>(lane_index()); id < experts; id += kWarp) {
    sum += expf(x[id] - largest);
  }
  return {ScoreKind::kSoftmax, largest, warp_sum(sum)};
}

__device__ __forceinline__ ExpertScores scores_of_all(const SelectArgs& args, const float* x,
                                                      int experts) {
  if (args.score == ScoreKind::kSigmoid) return {args.score, 0.0F, 1.0F};
  return softmax_of(x, experts, next_candidate(x, experts, {INFINITY, -1}).value);
}

__device__ __forceinline__ float group_rank(const float* ranks, int count, GroupScore score) {
  float first = -INFINITY, second = -INFINITY;
  for (int i = 0; i < count; ++i) {
    const bool leads = ranks[i] > first;
    second = leads ? first : fmaxf(ranks[i], second);
    first = leads ? ranks[i] : first;
  }
  return score == GroupScore::kLargest ? first : first + second;
}

// Ranks of experts of all but the best groups become -inf.
__device__ __forceinline__ void drop_groups(const SelectArgs& args, float* ranks, int experts,
                                            float* of_group) {
  const int groups = static_cast<int>(args.groups), size = experts / groups;
  const int lane = static_cast<int>(lane_index());
  for (int group = lane; group < groups; group += kWarp) {
    of_group[group] = group_rank(ranks + group * size, size, args.group_score);
  }
  __syncwarp();
  Candidate last{INFINITY, -1};
  for (int i = 0; i < args.top_groups; ++i) last = next_candidate(of_group, groups, last);
  for (int id = lane; id < experts; id += kWarp) {
    if (last.goes_before({of_group[id / size], id / size})) ranks[id] = -INFINITY;
  }
  __syncwarp();
}

// By what experts are ranked, in shared memory.
__device__ __forceinline__ const float* rank_experts(const SelectArgs& args, const float* x,
                                                     int experts) {
  float* ranks = reinterpret_cast<float*>(dynamic_shared()) +
                 threadIdx.y * (experts + static_cast<int>(args.groups));
  const bool by_logits = args.by_logits;
  const ExpertScores scores = by_logits ? ExpertScores{} : scores_of_all(args, x, experts);
  for (int id = static_cast<int>(lane_index()); id < experts; id += kWarp) {
    const float rank = by_logits ? x[id] : scores.of(x[id]);
    ranks[id] = args.choice_bias ? rank + args.choice_bias[id] : rank;
  }
  __syncwarp();
  if (args.limits_groups) drop_groups(args, ranks, experts, ranks + experts);
  return ranks;
}

__device__ __forceinline__ float largest_chosen(const float* x, const float* ranks, int experts,
                                                Candidate last) {
  float most = -INFINITY;
  for (int id = static_cast<int>(lane_index()); id < experts; id += kWarp) {
    if (!last.goes_before({ranks[id], id})) most = fmaxf(most, x[id]);
  }
  return first_of_warp({most, 0}).value;
}

// Scores of the chosen experts, all up to `last` in order of rank. Where the largest logit
// may not be among them, weights that will be divided by their sum are a softmax of the chosen
// logits alone: the others could leave nothing of them.
__device__ __forceinline__ ExpertScores scores_of_chosen(const SelectArgs& args, const float* x,
                                                         const float* ranks, int experts,
                                                         Candidate last) {
  if (args.score == ScoreKind::kSigmoid || !args.renormalize) {
    return scores_of_all(args, x, experts);
  }
  return {args.score, largest_chosen(x, ranks, experts, last), 1.0F};
}

// Writes the chosen ones, all up to `last` in order of rank, by ascending id.
__device__ __forceinline__ void write_chosen(const SelectArgs& args, const float* x,
                                             const float* ranks, int experts, Candidate last,
                                             const ExpertScores& scores, std::int32_t* ids,
                                             float* weights) {
  const int lane = static_cast<int>(lane_index());
  int written = 0;
  float total = 0.0F;
  for (int first = 0; first < experts; first += kWarp) {
    const int id = first + lane;
    const bool keeps = id < experts && !last.goes_before({ranks[id], id});
    const float weight = keeps ? scores.of(x[id]) : 0.0F;
    const unsigned kept = __ballot_sync(~0U, keeps);
    if (keeps) {
      const int at = written + __popc(kept & ((1U << lane) - 1));
      ids[at] = id;
      weights[at] = weight;
    }
    written += __popc(kept);
    total += warp_sum(weight);
  }
  if (!args.renormalize && args.scale == 1.0F) return;
  __syncwarp();
  const float divisor = args.renormalize ? total + args.least_sum : 1.0F;
  for (int i = lane; i < args.chosen; i += kWarp) weights[i] = weights[i] / divisor * args.scale;
}

template <bool kIsPlain>
__global__ void select_experts_kernel(SelectArgs args, unsigned long long* first_nonfinite) {
  const std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= args.rows) return;
  const float* x = args.logits + row * args.logits_stride;
  std::int32_t* ids = args.ids + row * args.ids_stride;
  float* weights = args.weights + row * args.weights_stride;
  const int experts = static_cast<int>(args.experts), chosen = static_cast<int>(args.chosen);
  if (!all_finite(x, experts) || (args.choice_bias && !all_finite(args.choice_bias, experts))) {
    for (int i = static_cast<int>(lane_index()); i < chosen; i += kWarp) {
      ids[i] = i;
      weights[i] = 0.0F;
    }
    if (lane_index() == 0) atomicMin(first_nonfinite, static_cast<unsigned long long>(row));
    return;
  }
  const float* ranks = kIsPlain ? x : rank_experts(args, x, experts);
  Candidate last = next_candidate(ranks, experts, {INFINITY, -1});
  const float largest = last.value;
  for (int i = 1; i < chosen; ++i) last = next_candidate(ranks, experts, last);
  const ExpertScores scores =
      kIsPlain ? softmax_of(x, experts, largest) : scores_of_chosen(args, x, ranks, experts, last);
  write_chosen(args, x, ranks, experts, last, scores, ids, weights);
}

std::int64_t select_experts_cuda(const SelectArgs& args) {
  auto* first_nonfinite = Mailbox::of_thread().room<unsigned long long>(1);
  *first_nonfinite = static_cast<unsigned long long>(args.rows);
  const auto shared = static_cast<std::size_t>(args.experts + args.groups) * sizeof(float);
  launch(args.is_plain ? select_experts_kernel<true> : select_experts_kernel<false>,
         dim3{static_cast<unsigned>(ceil_div(args.rows, kRowsOfABlock))},
         dim3{kWarp, kRowsOfABlock}, args.is_plain ? 0 : kRowsOfABlock * shared, args.on.stream,
         args, first_nonfinite);
  synchronize(args.on.stream);
  const auto row = static_cast<std::int64_t>(*first_nonfinite);
  return row < args.rows ? row : -1;
}

}  // namespace

const SelectKernels select_kernels = {select_experts_cuda};

}  // namespace pympa::cuda
