// Attention on threads: the work items, and the work of one item.

#include "cpu/parallel.hpp"
#include "ops/attention_packed.hpp"
#include "ops/attention_streamed.hpp"

namespace pympa::PYMPA_ISA {

namespace {

constexpr int64_t kLeastChunk = 512;  // query rows of an item: they repay packing K and V
constexpr int64_t kItemsPerThread = 4;

// See `attention_isa`.
template <class Body>
void with_attended_type(DType dtype, Body&& body) {
  constexpr bool kAsFloat = PYMPA_ISA_LEVEL != 4 || PYMPA_EMULATED;
  with_type<kAsFloat>(dtype, body);
}

int64_t workspace_bytes(int64_t head_dim, int64_t v_head_dim, DType dtype, const Execution& on) {
  int64_t bytes = 0;
  with_attended_type(dtype, [&]<class T>() { bytes = Layout<T>(head_dim, v_head_dim).bytes(); });
  return on.threads * bytes + kAlignment;
}

// Tiles whose rows are not consecutive, one for each thread.
int64_t range_workspace_bytes(const AttendArgs& args) {
  const int64_t element_bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  return args.on.threads * gathered_bytes(args, element_bytes);
}

// The most heads that share a K/V head.
int64_t most_sharing(const AttendArgs& args) {
  int64_t most = 1;
  for (int64_t kv_head = 0; kv_head < args.kv_heads; ++kv_head) {
    int64_t count = 0;
    for (int64_t head = 0; head < args.heads; ++head) {
      count += args.kv_head_of_q[head] == kv_head;
    }
    most = max_of(most, count);
  }
  return most;
}

// Query rows of a chunk whose queries and output stay in the cache over all tiles of keys, where
// reading them again for each tile would take longer than packing keys again for each chunk.
template <class T>
int64_t most_rows(const AttendArgs& args) {
  constexpr int64_t kBytes = PackedAttention<T>::kChunkBytes, kFloat = sizeof(float);
  const int64_t row = args.head_dim * static_cast<int64_t>(sizeof(T)) + args.v_head_dim * kFloat;
  return max_of(kBytes / (row * most_sharing(args)), kLeastChunk);
}

// Splits every longer query range into chunks of whole row blocks, as even as they come; an item is
// one chunk of one range for one K/V head.
struct Items {
  int64_t few, chunk, count;

  Items(const AttendArgs& args, int64_t streamed_rows, int64_t most)
      : few(streamed_rows), chunk(most), count(0) {
    if (args.on.threads > 1) {
      int64_t rows = 0;
      for (int64_t i = 0; i < args.q_range_count; ++i) rows += args.q_ranges[i].length;
      const int64_t share = rows * args.kv_heads / (args.on.threads * kItemsPerThread);
      chunk = min_of(chunk, max_of(share, kLeastChunk));
    }
    for (int64_t i = 0; i < args.q_range_count; ++i) count += chunks_of(args.q_ranges[i]);
  }

  int64_t chunks_of(const TokenRange& range) const {
    return range.length <= few ? 0 : max_of(range.length / chunk, 1);
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
  PackedAttention<T> worker(args, thread);
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

// One range over threads that share its key tiles.
template <class T>
void attend_together(const AttendArgs& args, const TokenRange& range, int64_t row) {
  int tiles = 0;
  for_each_tile(args, range, 0, range.length, [&](const KeyTile&) { ++tiles; });
  const int threads = static_cast<int>(min_of(args.on.threads, tiles));
  if (threads <= 1) return StreamedAttention<T>(args, 0, 1, 0).attend_rows(range, row);
  with_team(threads, [&](int member, int team) {
    StreamedAttention<T>(args, member, team, member).attend_rows(range, row);
  });
}

// The ranges of at most `few` rows: many are shared out whole, each of some is read by all threads.
template <class T>
void attend_few(const AttendArgs& args, int64_t few) {
  int64_t count = 0;
  for (int64_t i = 0; i < args.q_range_count; ++i) count += args.q_ranges[i].length <= few;
  const bool whole = args.on.threads == 1 || count >= 2 * args.on.threads;
  const auto run = [&](int64_t i, int thread) {
    int64_t row = 0;
    for (int64_t before = 0; before < i; ++before) row += args.q_ranges[before].length;
    const TokenRange& range = args.q_ranges[i];
    if (range.length == 0 || range.length > few) return;
    if (whole) {
      StreamedAttention<T>(args, thread, 1, 0).attend_rows(range, row);
    } else {
      attend_together<T>(args, range, row);
    }
  };
  for_each_item(whole ? args.on.threads : 1, args.q_range_count, run);
}

void attend_cpu(const AttendArgs& args) {
  with_attended_type(args.dtype, [&]<class T>() {
    // Query rows up to which a range is streamed: all that share a K/V head count.
    const int64_t few = StreamedAttention<T>::kFewRows / most_sharing(args);
    const Items items(args, few, most_rows<T>(args));
    for_each_item(args.on.threads, args.kv_heads * items.count,
                  [&](int64_t item, int thread) { attend_item<T>(args, items, item, thread); });
    attend_few<T>(args, few);
  });
}

}  // namespace

const AttentionKernels attention_kernels = {workspace_bytes, range_workspace_bytes, attend_cpu};

}  // namespace pympa::PYMPA_ISA
