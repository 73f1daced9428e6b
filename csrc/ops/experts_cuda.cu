// Mixture of experts: softmax and top-k of logits [rows, experts], and the weighted sum
//
//   out [rows, columns] = round(x[inverse 0] * weight 0 + x[inverse 1] * weight 1 + ... + base)
//
// One warp selects the experts of a row; it reads the logits from memory once, and from the cache
// `chosen` times. The weighted sum reads chosen + 1 elements for each that it writes.

#include "cuda/mailbox.hpp"
#include "cuda/rows.hpp"
#include "cuda/warp.hpp"
#include "ops/experts.hpp"

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
__device__ __forceinline__ Candidate next_candidate(const float* x, int experts, Candidate last) {
  Candidate best{-INFINITY, experts};
  for (int id = static_cast<int>(lane_index()); id < experts; id += kWarp) {
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

// Writes the chosen ones, all up to `last` in order of value, by ascending id.
__device__ __forceinline__ void write_chosen(const float* x, int experts, int chosen, float largest,
                                             Candidate last, bool renormalize, std::int32_t* ids,
                                             float* weights) {
  const int lane = static_cast<int>(lane_index());
  float sum = 0.0F;
  for (int id = lane; id < experts; id += kWarp) sum += expf(x[id] - largest);
  sum = warp_sum(sum);
  int written = 0;
  float total = 0.0F;
  for (int first = 0; first < experts; first += kWarp) {
    const int id = first + lane;
    const bool keeps = id < experts && !last.goes_before({x[id], id});
    const float weight = keeps ? expf(x[id] - largest) / sum : 0.0F;
    const unsigned kept = __ballot_sync(~0U, keeps);
    if (keeps) {
      const int at = written + __popc(kept & ((1U << lane) - 1));
      ids[at] = id;
      weights[at] = weight;
    }
    written += __popc(kept);
    total += warp_sum(weight);
  }
  if (!renormalize) return;
  __syncwarp();
  for (int i = lane; i < chosen; i += kWarp) weights[i] /= total;
}

__global__ void select_experts_kernel(SelectArgs args, unsigned long long* first_nonfinite) {
  const std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= args.rows) return;
  const float* x = args.logits + row * args.logits_stride;
  std::int32_t* ids = args.ids + row * args.ids_stride;
  float* weights = args.weights + row * args.weights_stride;
  const int experts = static_cast<int>(args.experts), chosen = static_cast<int>(args.chosen);
  if (!all_finite(x, experts)) {
    for (int i = static_cast<int>(lane_index()); i < chosen; i += kWarp) {
      ids[i] = i;
      weights[i] = 0.0F;
    }
    if (lane_index() == 0) atomicMin(first_nonfinite, static_cast<unsigned long long>(row));
    return;
  }
  Candidate last = next_candidate(x, experts, {INFINITY, -1});
  const float largest = last.value;
  for (int i = 1; i < chosen; ++i) last = next_candidate(x, experts, last);
  write_chosen(x, experts, chosen, largest, last, args.renormalize, ids, weights);
}

std::int64_t select_experts_cuda(const SelectArgs& args) {
  auto* first_nonfinite = Mailbox::of_thread().room<unsigned long long>(1);
  *first_nonfinite = static_cast<unsigned long long>(args.rows);
  launch(select_experts_kernel, dim3{static_cast<unsigned>(ceil_div(args.rows, kRowsOfABlock))},
         dim3{kWarp, kRowsOfABlock}, 0, args.on.stream, args, first_nonfinite);
  synchronize(args.on.stream);
  const auto row = static_cast<std::int64_t>(*first_nonfinite);
  return row < args.rows ? row : -1;
}

template <class T>
struct Combine {
  Rows<const T> x, base;
  Rows<const std::int32_t> inverse;
  Rows<const float> weights;
  Rows<T> out;
  std::int64_t rows, columns;
  int chosen;
  bool aligned;
};

template <class T>
__global__ void combine_rows_kernel(Combine<T> args) {
  constexpr int kCount = kGroup<T>;
  for_each_group<kCount>(
      args.rows, args.columns, args.aligned,
      [&]<bool kWhole>(std::int64_t row, std::int64_t column, std::int64_t left) {
        float sums[kCount] = {};
#pragma unroll 4  // loads of several choices are under way together
        for (int choice = 0; choice < args.chosen; ++choice) {
          const std::int32_t place = *args.inverse(row, choice);
          const float weight = *args.weights(row, choice);
          Group<T> x{};
          if (place >= 0) x = read<kWhole>(args.x(place, column), left);
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            sums[i] = place >= 0 ? fmaf(weight, to_float(x.at[i]), sums[i]) : sums[i];
          }
        }
        if (args.base.at) {
          float y[kCount];
          load<kWhole>(args.base(row, column), left, y);
#pragma unroll
          for (int i = 0; i < kCount; ++i) sums[i] += y[i];
        }
        store<kWhole>(args.out(row, column), left, sums);
      });
}

void combine_rows_cuda(const CombineArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    Combine<T> combine{{static_cast<const T*>(args.x), args.x_stride},
                       {static_cast<const T*>(args.base), args.base_stride},
                       {args.inverse, args.inverse_stride},
                       {args.weights, args.weights_stride},
                       {static_cast<T*>(args.out), args.out_stride},
                       args.rows,
                       args.columns,
                       static_cast<int>(args.chosen),
                       false};
    combine.aligned = is_aligned(combine.x) && is_aligned(combine.base) && is_aligned(combine.out);
    const auto [grid, block] = row_grid(args.rows, ceil_div(args.columns, kGroup<T>));
    launch(combine_rows_kernel<T>, grid, block, 0, args.on.stream, combine);
  });
}

}  // namespace

const ExpertKernels expert_kernels = {select_experts_cuda, combine_rows_cuda};

}  // namespace pympa::cuda
