// Mixture of experts: softmax and top-k of logits [rows, experts], and the weighted sum
//
//   out [rows, columns] = round(x[inverse 0] * weight 0 + x[inverse 1] * weight 1 + ... + base)

#include <mutex>

#include "cpu/convert.hpp"
#include "cpu/math.hpp"
#include "cpu/parallel.hpp"
#include "ops/experts.hpp"

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

void select_row(const SelectArgs& args, const float* x, int32_t* ids, float* weights) {
  keep_largest(x, args.experts, args.chosen, ids, weights);
  const float shift = largest(weights, args.chosen);
  const float sum = sum_of_exp(x, args.experts, shift);
  for (int64_t i = 0; i < args.chosen; i += W) {
    const int64_t count = args.chosen - i;
    store(weights + i, exp(load(weights + i, count) - splat(shift)) / splat(sum), count);
  }
  if (!args.renormalize) return;
  float total = 0.0f;
  for (int64_t i = 0; i < args.chosen; ++i) total += weights[i];
  for (int64_t i = 0; i < args.chosen; ++i) weights[i] /= total;
}

// The first row that is not finite, or -1.
int64_t select_rows(const SelectArgs& args, int64_t first, int64_t last) {
  int64_t nonfinite = -1;
  for (int64_t row = first; row < last; ++row) {
    const float* x = args.logits + row * args.logits_stride;
    int32_t* ids = args.ids + row * args.ids_stride;
    float* weights = args.weights + row * args.weights_stride;
    if (all_finite(x, args.experts)) {
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

template <class T>
void combine_rows_of(const CombineArgs& args, int64_t first, int64_t last) {
  const T* x = static_cast<const T*>(args.x);
  for (int64_t row = first; row < last; ++row) {
    const int32_t* inverse = args.inverse + row * args.inverse_stride;
    const float* weights = args.weights + row * args.weights_stride;
    const T* base = static_cast<const T*>(args.base) + row * args.base_stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    for (int64_t i = 0; i < args.columns; i += W) {
      const int64_t count = args.columns - i;
      V sums{};
      for (int64_t c = 0; c < args.chosen; ++c) {
        if (inverse[c] < 0) continue;
        sums = fma(splat(weights[c]), load(x + inverse[c] * args.x_stride + i, count), sums);
      }
      if (args.base) sums += load(base + i, count);
      store(out + i, sums, count);
    }
  }
}

void combine_rows_cpu(const CombineArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    for_row_pieces(args.on.threads, args.rows,
                   [&](int64_t first, int64_t last) { combine_rows_of<T>(args, first, last); });
  });
}

}  // namespace

const ExpertKernels expert_kernels = {select_experts_cpu, combine_rows_cpu};

}  // namespace pympa::PYMPA_ISA
