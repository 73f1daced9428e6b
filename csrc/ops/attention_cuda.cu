// Attention on a GPU: the choice of the kernel for a call, and its division into launches.

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "ops/attention_launch_cuda.hpp"

namespace pympa::cuda {

namespace {

// Whether the vector of `elements` at the start of each row and head is aligned to its bytes.
bool is_aligned(const void* data, std::int64_t row_stride, std::int64_t head_stride,
                std::int64_t elements, std::int64_t element_bytes) {
  const auto bytes = static_cast<std::uintptr_t>(elements * element_bytes);
  return reinterpret_cast<std::uintptr_t>(data) % bytes == 0 && row_stride % elements == 0 &&
         head_stride % elements == 0;
}

bool loads_by_16_bytes(const HeadRows<const void>& rows) {
  return is_aligned(rows.data, rows.row, rows.head, 8, 2);
}

void check_sizes(const AttendArgs& args) {
  for (const auto& [what, dim, most] : {std::tuple{"head_dim", args.head_dim, kMostKeyDim},
                                        std::tuple{"v_head_dim", args.v_head_dim, kMostValueDim}}) {
    if (args.folds_scores && dim > most) {
      throw std::invalid_argument(std::string("attend_block: ") + what + ": expected at most " +
                                  std::to_string(most) + " on CUDA, got " + std::to_string(dim));
    }
  }
  for (const auto& [what, stride] : {std::pair{"k", args.k.row}, std::pair{"v", args.v.row}}) {
    if (stride >= kMostRowStride) {
      throw std::invalid_argument(
          std::string("attend_block: ") + what + ": expected a row stride below " +
          std::to_string(kMostRowStride) + " elements on CUDA, got " + std::to_string(stride));
    }
  }
  const auto check_end = [](std::int64_t end) {
    if (end > kMostTokens) {
      throw std::invalid_argument("attend_block: expected positions and rows of keys below " +
                                  std::to_string(kMostTokens) + ", got " + std::to_string(end));
    }
  };
  for (std::int64_t i = 0; i < args.q_range_count; ++i) {
    check_end(args.q_ranges[i].start + args.q_ranges[i].length);
  }
  for (std::int64_t i = 0; i < args.k_range_count; ++i) {
    check_end(
        std::max(args.k_ranges[i].end(), args.k_ranges[i].first_row + args.k_ranges[i].length));
  }
}

// The index of a sequence in the sorted sequences of the key ranges; -1 for a sequence without
// keys.
int sequence_index(const std::vector<std::int64_t>& sequences, std::int64_t sequence) {
  const auto at = std::lower_bound(sequences.begin(), sequences.end(), sequence);
  const bool known = at != sequences.end() && *at == sequence;
  return known ? static_cast<int>(at - sequences.begin()) : -1;
}

// Query ranges that are not empty and meet keys.
std::vector<Range> query_ranges(const AttendArgs& args,
                                const std::vector<std::int64_t>& sequences) {
  std::vector<Range> all;
  std::int64_t row = 0;
  for (std::int64_t i = 0; i < args.q_range_count; row += args.q_ranges[i].length, ++i) {
    const TokenRange& range = args.q_ranges[i];
    const int sequence = sequence_index(sequences, range.sequence);
    if (range.length == 0 || sequence < 0) continue;
    all.push_back({sequence, static_cast<int>(range.start), static_cast<int>(range.length),
                   static_cast<int>(row)});
  }
  return all;
}

// Key ranges that are not empty. A range that follows the one before in positions and in rows is
// merged with it. A tile is loaded from consecutive rows, so a sequence may go on in other rows
// only at the start of a tile; with `decode`, splits of kKeyTile positions are attended separately.
std::vector<Range> key_ranges(const AttendArgs& args, const std::vector<std::int64_t>& sequences) {
  const std::int64_t tile = args.decode ? kKeyTile : kKeys;
  std::vector<Range> all;
  const KeyRange* before = nullptr;
  for (std::int64_t i = 0; i < args.k_range_count; ++i) {
    const KeyRange& range = args.k_ranges[i];
    if (range.length == 0) continue;
    if (before && range.continues(*before)) {
      all.back().length += static_cast<int>(range.length);
    } else {
      if (before && range.adjoins(*before) && range.start % tile) {
        throw std::invalid_argument(
            "attend_block: k_ranges: expected a sequence to go on in other rows only at multiples "
            "of " +
            std::to_string(tile) + " on CUDA, got " + std::to_string(range.start));
      }
      all.push_back({sequence_index(sequences, range.sequence), static_cast<int>(range.start),
                     static_cast<int>(range.length), static_cast<int>(range.first_row)});
    }
    before = &range;
  }
  return all;
}

std::vector<std::int64_t> sorted_key_sequences(const AttendArgs& args) {
  std::vector<std::int64_t> sequences;
  for (std::int64_t i = 0; i < args.k_range_count; ++i) {
    sequences.push_back(args.k_ranges[i].sequence);
  }
  std::sort(sequences.begin(), sequences.end());
  return sequences;
}

int kv_head_of(const AttendArgs& args, int head) {
  return args.kv_head_of_q ? args.kv_head_of_q[head] : 0;  // null if a caller only asks for sizes
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
  params.out_pairs_aligned =
      is_aligned(args.out.data, args.out.row, args.out.head, 2, sizeof(float));
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
  const std::vector<std::int64_t> sequences = sorted_key_sequences(args);
  std::vector<Range> queries = query_ranges(args, sequences);
  const std::vector<Range> keys = key_ranges(args, sequences);
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

// No workspace depends on sizes alone; that of decoding depends on the ranges.
std::int64_t workspace_bytes(std::int64_t, std::int64_t, DType, const Execution&) { return 0; }

std::int64_t range_workspace_bytes(const AttendArgs& args) {
  return args.decode ? decode_workspace_bytes(args) : 0;
}

void attend_cuda(const AttendArgs& args) {
  if (!args.folds_scores) {
    make_scores(args);
  } else if (!args.makes_scores) {
    with_16_bits(args.dtype, [&]<class T>() { fold_scores<T>(args); });
  } else if (args.decode) {
    attend_decode(args);
  } else {
    with_16_bits(args.dtype, [&]<class T>() { attend_rows<T>(args); });
  }
}

}  // namespace

const AttentionKernels attention_kernels = {workspace_bytes, range_workspace_bytes, attend_cuda};

}  // namespace pympa::cuda
