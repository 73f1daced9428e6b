// Exact attention of packed rows, which folds blocks of keys into a float32 running state.
#pragma once

#include <cstdint>

#include "core/dispatch.hpp"

namespace pympa {

struct TensorView;

constexpr std::int64_t kKeyTile = 512;  // part of the contract on bits: never change it for speed

// Consecutive tokens of a sequence; rows of queries are packed in the order of their ranges.
struct TokenRange {
  std::int64_t sequence, start, length;
};

// Consecutive keys of a sequence, in consecutive rows from `first_row` on: ranges may lie anywhere
// in the arrays of keys and values, as pages of a cache do. Ranges of a call that follow each other
// and adjoin count as one: a key tile that they share is folded once.
struct KeyRange {
  std::int64_t sequence, start, length, first_row;

  std::int64_t end() const { return start + length; }
  bool adjoins(const KeyRange& before) const {
    return sequence == before.sequence && start == before.end();
  }
  bool continues(const KeyRange& before) const {
    return adjoins(before) && first_row == before.first_row + before.length;
  }
};

// What turns scores into softmax weights; `attention_rule` makes it.
struct AttentionRule {
  float scale;
  bool causal;
  std::int64_t window;  // 0: none
  float softcap;        // 0: none
};

// Refuses what float32 does not hold.
AttentionRule attention_rule(const char* op, double scale, bool causal, std::int64_t window,
                             double softcap);

// An array [rows, heads, any], strides in elements.
template <class Data>
struct HeadRows {
  Data* data;
  std::int64_t row, head;
};

struct AttendArgs {
  // At least one. A call that does not do both hands the scores over in `scores`.
  bool makes_scores = false, folds_scores = false;
  DType dtype = DType::kFloat32;
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0, v_head_dim = 0;
  HeadRows<const void> q{}, k{}, v{};
  HeadRows<float> scores{};
  const TokenRange* q_ranges = nullptr;
  const KeyRange* k_ranges = nullptr;
  std::int64_t q_range_count = 0, k_range_count = 0;
  HeadRows<float> row_max{}, row_sum{}, out{};
  const std::int32_t* kv_head_of_q = nullptr;
  AttentionRule rule{};
  bool decode = false;
  void* workspace = nullptr;
  Execution on;
};

// A state (row_max, row_sum [rows, heads], out [rows, heads, v_head_dim]), contiguous.
struct AttentionState {
  float *row_max, *row_sum, *out;
};

struct StartArgs {
  std::int64_t rows, heads, v_head_dim;  // rows counts (row, head) pairs
  AttentionState state;
  DType dtype;        // of sinks
  const void* sinks;  // [heads], null if none
  Execution on;
};

struct MergeArgs {
  std::int64_t rows, v_head_dim;
  AttentionState into, other;
  Execution on;
};

struct FinishArgs {
  std::int64_t rows, v_head_dim;
  AttentionState state;
  DType dtype;
  void* o;
  float* lse;
  Execution on;
};

struct AttentionKernels {
  std::int64_t (*workspace_bytes)(std::int64_t head_dim, std::int64_t v_head_dim, DType dtype,
                                  const Execution& on);
  // More that a call needs for its ranges; of `args`, sizes, dtype, ranges and `decode` count.
  std::int64_t (*range_workspace_bytes)(const AttendArgs& args);
  void (*attend)(const AttendArgs& args);
};

struct AttentionStateKernels {
  void (*start)(const StartArgs& args);
  void (*merge)(const MergeArgs& args);
  void (*finish)(const FinishArgs& args);
};

// Whose kernels attend: float32 is not split into bfloat16 here, since softmax makes values that
// are too small for it.
constexpr Isa attention_isa(DType dtype, Isa isa) {
  return isa == Isa::kAmxBf16 && dtype == DType::kFloat32 ? Isa::kAvx512 : isa_for(dtype, isa);
}

PYMPA_DECLARE_KERNELS(AttentionKernels, attention_kernels)
PYMPA_DECLARE_FLOAT_KERNELS(AttentionStateKernels, attention_state_kernels)

// A head_dim of 0 is for `fold_tile`, a v_head_dim of 0 for `score_tile`.
std::int64_t attention_workspace_bytes(std::int64_t head_dim, std::int64_t v_head_dim, DType dtype,
                                       const Execution& on);

// What `attend_block` needs beside that for its ranges: where it decodes on a GPU, and where a CPU
// meets a key tile whose rows are not consecutive.
std::int64_t range_workspace_bytes(std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
                                   std::int64_t v_head_dim, DType dtype, const TensorView& q_ranges,
                                   const TensorView& k_ranges, bool decode, const Execution& on);

// `decode` is for few rows with many keys: another way on a GPU, with bits of its own.
void attend_block(const TensorView& q, const TensorView& k, const TensorView& v,
                  const TensorView& q_ranges, const TensorView& k_ranges, const TensorView& row_max,
                  const TensorView& row_sum, const TensorView& out, const TensorView& kv_head_of_q,
                  const AttentionRule& rule, bool decode, const TensorView& workspace,
                  const Execution& on);

// The two halves of `attend_block` on one key tile: q k^T, and what becomes of it.
void score_tile(const TensorView& q, const TensorView& k, const TensorView& kv_head_of_q,
                const TensorView& scores, const TensorView& workspace, const Execution& on);

void fold_tile(const TensorView& scores, const TensorView& v, const TensorView& kv_head_of_q,
               std::int64_t q_start, std::int64_t k_start, const TensorView& row_max,
               const TensorView& row_sum, const TensorView& out, const AttentionRule& rule,
               const TensorView& workspace, const Execution& on);

// A state that has seen no key: row_max = -inf, the rest 0. With sinks [heads] it has seen a key of
// that score without a value (Xiao et al., 2023): row_max = sink, row_sum = 1, out = 0.
void start_state(const TensorView& row_max, const TensorView& row_sum, const TensorView& out,
                 const TensorView* sinks, const Execution& on);

// Folds `other` into the first state.
void merge(const TensorView& row_max, const TensorView& row_sum, const TensorView& out,
           const TensorView& other_row_max, const TensorView& other_row_sum,
           const TensorView& other_out, const Execution& on);

// o = round(out / row_sum), lse = row_max + ln(row_sum); fully masked rows give 0 and -inf.
void finish(const TensorView& row_max, const TensorView& row_sum, const TensorView& out,
            const TensorView& o, const TensorView& lse, const Execution& on);

}  // namespace pympa
