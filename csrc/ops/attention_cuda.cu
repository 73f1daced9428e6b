// Attention on a GPU: which kernel a call is for, and how it is cut into launches.

#include <algorithm>
#include <numeric>
#include <vector>

#include "ops/attention_launch_cuda.hpp"

namespace pympa::cuda {

namespace {

bool is_multiple(const void* data, std::int64_t row, std::int64_t head, std::int64_t elements,
                 std::int64_t element_bytes) {
  const auto bytes = static_cast<std::uintptr_t>(elements * element_bytes);
  return reinterpret_cast<std::uintptr_t>(data) % bytes == 0 && row % elements == 0 &&
         head % elements == 0;
}

bool loads_by_16_bytes(const HeadRows<const void>& rows) {
  return is_multiple(rows.data, rows.row, rows.head, 8, 2);
}

void check_sizes(const AttendArgs& args) {
  const char* what = args.head_dim > args.v_head_dim ? "head_dim" : "v_head_dim";
  const std::int64_t most = args.folds_scores ? std::max(args.head_dim, args.v_head_dim) : 0;
  if (most > kMostHeadDim) {
    throw std::invalid_argument(std::string("attend_block: ") + what + ": expected at most " +
                                std::to_string(kMostHeadDim) + " on CUDA, got " +
                                std::to_string(most));
  }
  for (const auto* rows : {&args.k, &args.v}) {
    if (rows->row >= kMostRowStride) {
      throw std::invalid_argument("attend_block: expected rows of keys less than " +
                                  std::to_string(kMostRowStride) + " elements apart, got " +
                                  std::to_string(rows->row));
    }
  }
  for (const auto& [ranges, count] : {std::pair{args.q_ranges, args.q_range_count},
                                      std::pair{args.k_ranges, args.k_range_count}}) {
    for (std::int64_t i = 0; i < count; ++i) {
      if (ranges[i].start + ranges[i].length > kMostTokens) {
        throw std::invalid_argument("attend_block: expected positions below " +
                                    std::to_string(kMostTokens) + ", got " +
                                    std::to_string(ranges[i].start + ranges[i].length));
      }
    }
  }
}

// Ranges that are not empty, with a small number for each sequence of the keys; -1 for others.
std::vector<Range> numbered(const TokenRange* ranges, std::int64_t count,
                            const std::vector<std::int64_t>& sequences) {
  std::vector<Range> all;
  std::int64_t row = 0;
  for (std::int64_t i = 0; i < count; row += ranges[i].length, ++i) {
    const auto at = std::lower_bound(sequences.begin(), sequences.end(), ranges[i].sequence);
    const bool known = at != sequences.end() && *at == ranges[i].sequence;
    if (ranges[i].length == 0 || !known) continue;
    all.push_back({static_cast<int>(at - sequences.begin()), static_cast<int>(ranges[i].start),
                   static_cast<int>(ranges[i].length), static_cast<int>(row)});
  }
  return all;
}

std::vector<std::int64_t> sequences_of(const AttendArgs& args) {
  std::vector<std::int64_t> sequences;
  for (std::int64_t i = 0; i < args.k_range_count; ++i) {
    sequences.push_back(args.k_ranges[i].sequence);
  }
  std::sort(sequences.begin(), sequences.end());
  return sequences;
}

int kv_head_of(const AttendArgs& args, int head) {
  return args.kv_head_of_q ? args.kv_head_of_q[head] : 0;  // none where only sizes are asked for
}

// Query heads ordered by their K/V head: those that read the same keys run side by side.
std::vector<int> heads_by_kv_head(const AttendArgs& args) {
  std::vector<int> heads(static_cast<std::size_t>(args.heads));
  std::iota(heads.begin(), heads.end(), 0);
  std::stable_sort(heads.begin(), heads.end(),
                   [&](int a, int b) { return kv_head_of(args, a) < kv_head_of(args, b); });
  return heads;
}

AttendParams params_of(const AttendArgs& args) {
  AttendParams params{};
  params.q = args.q;
  params.k = args.k;
  params.v = args.v;
  if (!args.makes_scores) params.scores = {args.scores.data, args.scores.row, args.scores.head};
  params.row_max = args.row_max;
  params.row_sum = args.row_sum;
  params.out = args.out;
  params.head_dim = static_cast<int>(args.head_dim);
  params.v_head_dim = static_cast<int>(args.v_head_dim);
  params.window = static_cast<int>(std::min<std::int64_t>(args.rule.window, kMostTokens));
  params.scale = args.rule.scale;
  params.softcap = args.rule.softcap;
  params.causal = args.rule.causal;
  params.q_aligned = loads_by_16_bytes(args.q);
  params.k_aligned = loads_by_16_bytes(args.k);
  params.v_aligned = loads_by_16_bytes(args.v);
  params.pairs = is_multiple(args.out.data, args.out.row, args.out.head, 2, sizeof(float));
  params.writes_sums = true;
  return params;
}

// Copies items [first, first + most) of `from`; returns how many there were.
template <class Item>
int take(const std::vector<Item>& from, std::size_t first, int most, Item* to) {
  const std::size_t count = std::min(from.size() - first, static_cast<std::size_t>(most));
  std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(first), count, to);
  return static_cast<int>(count);
}

}  // namespace

void for_each_launch(const AttendArgs& args, const std::function<void(AttendParams&)>& run) {
  check_sizes(args);
  const std::vector<std::int64_t> sequences = sequences_of(args);
  std::vector<Range> queries = numbered(args.q_ranges, args.q_range_count, sequences);
  const std::vector<Range> keys = numbered(args.k_ranges, args.k_range_count, sequences);
  // Late queries see most keys under a causal mask: they start first.
  std::stable_sort(queries.begin(), queries.end(), [](const Range& a, const Range& b) {
    return a.start + a.length > b.start + b.length;
  });
  const std::vector<int> heads = heads_by_kv_head(args);
  AttendParams params = params_of(args);
  for (std::size_t head = 0; head < heads.size(); head += kMostHeads) {
    params.heads = static_cast<int>(std::min<std::size_t>(heads.size() - head, kMostHeads));
    for (int i = 0; i < params.heads; ++i) {
      const int one = heads[head + static_cast<std::size_t>(i)];
      params.head[i] = static_cast<std::uint16_t>(one);
      params.kv_head[i] = static_cast<std::uint16_t>(kv_head_of(args, one));
    }
    for (std::size_t q = 0; q < queries.size(); q += kMostRanges) {
      params.q_range_count = take(queries, q, kMostRanges, params.q_ranges);
      for (std::size_t k = 0; k < keys.size(); k += kMostRanges) {
        params.k_range_count = take(keys, k, kMostRanges, params.k_ranges);
        AttendParams launch = params;
        run(launch);
      }
    }
  }
}

namespace {

std::int64_t workspace_bytes(std::int64_t, std::int64_t, DType, const Execution&) { return 0; }

void attend_cuda(const AttendArgs& args) {
  if (!args.folds_scores) {
    make_scores(args);
  } else if (!args.makes_scores) {
    fold_scores(args);
  } else if (args.decode) {
    attend_decode(args);
  } else {
    attend_rows(args);
  }
}

}  // namespace

const AttentionKernels attention_kernels = {workspace_bytes, decode_workspace_bytes, attend_cuda};

}  // namespace pympa::cuda
