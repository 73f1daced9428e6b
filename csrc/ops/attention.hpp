// Exact attention of packed rows, folded block by block into a float32 running state.
#pragma once

#include <cstdint>

#include "core/dispatch.hpp"

namespace pympa {

struct TensorView;

// One contiguous run of tokens: rows are packed in the order of the ranges.
struct TokenRange {
  std::int64_t sequence, start, length;
};

struct AttendArgs {
  DType dtype;
  std::int64_t heads, head_dim, v_head_dim, kv_heads;
  const void *q, *k, *v;
  std::int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides
  const TokenRange *q_ranges, *k_ranges;
  std::int64_t q_range_count, k_range_count;
  float *row_max, *row_sum, *out;
  std::int64_t max_row, sum_row, out_row, out_head;  // strides
  const std::int32_t* kv_head_of_q;
  float scale;
  bool causal;
  std::int64_t window;  // 0: none
  float softcap;        // 0: none
  void* workspace;
  int threads;
};

// A state (row_max, row_sum [rows, heads], out [rows, heads, v_head_dim]), contiguous.
struct AttentionState {
  float *row_max, *row_sum, *out;
};

struct MergeArgs {
  std::int64_t rows, v_head_dim;  // rows counts (row, head) pairs
  AttentionState into, other;
  int threads;
};

struct FinishArgs {
  std::int64_t rows, v_head_dim;
  AttentionState state;
  DType dtype;
  void* o;
  float* lse;
  int threads;
};

struct AttentionKernels {
  std::int64_t (*workspace_bytes)(std::int64_t head_dim, std::int64_t v_head_dim, DType dtype,
                                  int threads);
  void (*attend_block)(const AttendArgs& args);
};

struct AttentionStateKernels {
  void (*merge)(const MergeArgs& args);
  void (*finish)(const FinishArgs& args);
};

PYMPA_DECLARE_KERNELS(AttentionKernels, attention_kernels)
PYMPA_DECLARE_KERNELS(AttentionStateKernels, attention_state_kernels)

std::int64_t attention_workspace_bytes(std::int64_t head_dim, std::int64_t v_head_dim, DType dtype,
                                       int threads, Isa isa);

void attend_block(const TensorView& q, const TensorView& k, const TensorView& v,
                  const TensorView& q_ranges, const TensorView& k_ranges, const TensorView& row_max,
                  const TensorView& row_sum, const TensorView& out, const TensorView& kv_head_of_q,
                  float scale, bool causal, std::int64_t window, float softcap,
                  const TensorView& workspace, int threads, Isa isa);

// Folds `other` into the first state.
void merge(const TensorView& row_max, const TensorView& row_sum, const TensorView& out,
           const TensorView& other_row_max, const TensorView& other_row_sum,
           const TensorView& other_out, int threads, Isa isa);

// o = round(out / row_sum), lse = row_max + ln(row_sum); fully masked rows give 0 and -inf.
void finish(const TensorView& row_max, const TensorView& row_sum, const TensorView& out,
            const TensorView& o, const TensorView& lse, int threads, Isa isa);

}  // namespace pympa
