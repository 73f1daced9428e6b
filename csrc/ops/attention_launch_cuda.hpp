// Converts the arguments of a call to those of launches.
#pragma once

#include "ops/attention_block_cuda.hpp"

namespace pympa::cuda {

// Calls run(params) for launches that together are the call: of at most kMostHeads heads and
// kMostRanges ranges of each kind. Launches over later keys go on from the state of those before,
// so that the cuts change no bits.
void for_each_launch(const AttendArgs& args, const std::function<void(AttendParams&)>& run);

// Shared memory that a launch takes; chooses whether K and V share a buffer.
template <class Shape>
int fit_shared(AttendParams& params) {
  const int most = most_shared_bytes();
  params.one_buffer = shared_bytes<Shape>(params.head_dim, false) > most;
  const int bytes = shared_bytes<Shape>(params.head_dim, params.one_buffer);
  if (bytes > most) {
    throw std::invalid_argument("attend_block: head_dim " + std::to_string(params.head_dim) +
                                " and v_head_dim " + std::to_string(params.v_head_dim) + " take " +
                                std::to_string(bytes) + " bytes of shared memory, this GPU has " +
                                std::to_string(most));
  }
  return bytes;
}

template <class Run>
void with_16_bits(DType dtype, Run&& run) {
  if (dtype == DType::kFloat16) return run.template operator()<Half>();
  if (dtype == DType::kBFloat16) return run.template operator()<BFloat>();
  throw std::invalid_argument("attention on CUDA: expected dtype float16 or bfloat16, got float32");
}

// Instances of kernels take long to compile, so they are shared out over files: T is args.dtype.
template <class T>
void attend_rows(const AttendArgs& args);
template <class T>
void fold_scores(const AttendArgs& args);
void make_scores(const AttendArgs& args);
void attend_decode(const AttendArgs& args);
std::int64_t decode_workspace_bytes(const AttendArgs& args);

}  // namespace pympa::cuda
