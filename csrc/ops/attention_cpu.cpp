// Attention over threads: work items, and what one of them does.

#include "cpu/parallel.hpp"
#include "ops/attention_worker.hpp"

namespace pympa::PYMPA_ISA {

namespace {

constexpr int64_t kLeastChunk = 512;  // query rows of an item: they repay packing K and V
constexpr int64_t kItemsPerThread = 4;

int64_t workspace_bytes(int64_t head_dim, int64_t v_head_dim, DType dtype, int threads) {
  int64_t bytes = 0;
  with_type(dtype, [&]<class T>() { bytes = Layout<T>(head_dim, v_head_dim).bytes(); });
  return threads * bytes + kAlignment;
}

// Splits every query range into chunks of whole row blocks, as even as they come; an item is one
// chunk of one range for one K/V head.
struct Items {
  int64_t chunk, count;

  explicit Items(const AttendArgs& args) : chunk(INT64_MAX), count(0) {
    if (args.threads > 1) {
      int64_t rows = 0;
      for (int64_t i = 0; i < args.q_range_count; ++i) rows += args.q_ranges[i].length;
      chunk = max_of(rows * args.kv_heads / (args.threads * kItemsPerThread), kLeastChunk);
    }
    for (int64_t i = 0; i < args.q_range_count; ++i) count += chunks_of(args.q_ranges[i]);
  }

  int64_t chunks_of(const TokenRange& range) const {
    return range.length == 0 ? 0 : max_of(range.length / chunk, 1);
  }

  int64_t first_row(const TokenRange& range, int64_t index) const {
    const int64_t blocks = (range.length + kRows - 1) / kRows;
    return min_of(index * blocks / chunks_of(range) * kRows, range.length);
  }
};

template <class T>
void attend_item(const AttendArgs& args, const Items& items, int64_t item, int thread) {
  const int64_t kv_head = item / items.count;
  // The last chunks see the most keys under a causal mask, so they start first.
  int64_t index = items.count - 1 - item % items.count;
  int64_t row = 0, i = 0;
  for (; index >= items.chunks_of(args.q_ranges[i]); ++i) {
    index -= items.chunks_of(args.q_ranges[i]);
    row += args.q_ranges[i].length;
  }
  const TokenRange& range = args.q_ranges[i];
  const int64_t first = items.first_row(range, index), last = items.first_row(range, index + 1);
  Worker<T> worker(args, thread);
  int32_t heads[kRows];
  int64_t head_count = 0;
  for (int64_t head = 0; head < args.heads; ++head) {
    if (args.kv_head_of_q[head] == kv_head) heads[head_count++] = static_cast<int32_t>(head);
    if (head_count == kRows || (head + 1 == args.heads && head_count > 0)) {
      worker.attend_rows(range, row, first, last, kv_head, heads, head_count);
      head_count = 0;
    }
  }
}

void attend_cpu(const AttendArgs& args) {
  const Items items(args);
  with_type(args.dtype, [&]<class T>() {
    for_each_item(args.threads, args.kv_heads * items.count,
                  [&](int64_t item, int thread) { attend_item<T>(args, items, item, thread); });
  });
}

}  // namespace

const AttentionKernels attention_kernels = {workspace_bytes, attend_cpu};

}  // namespace pympa::PYMPA_ISA
