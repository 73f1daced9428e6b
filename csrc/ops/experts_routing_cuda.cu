// Routing of rows: chosen experts [rows, chosen] are counted, sorted and dropped. Pairs (row,
// choice) are numbered row by row.
//
// sort_rows: counts of each block of pairs -> first index of each block's pairs of each expert ->
// index of each pair. A block's counts, and then its first indices, use the memory of the final
// indices: a block has at least as many pairs as there are experts. A single block counts its own
// pairs.

#include "cuda/mailbox.hpp"
#include "cuda/rows.hpp"
#include "ops/experts.hpp"
#include "ops/experts_pairs.hpp"

namespace pympa::cuda {

namespace {

constexpr unsigned kCountThreads = 256;
constexpr unsigned kStartThreads = 1024;
constexpr std::int64_t kLeastPairs = 1024;  // of a block: fewer would be launches for little
constexpr std::int64_t kMostBlocks = 256;   // whose counts one block adds up

struct Sort {
  Pairs<const std::int32_t> ids;
  Pairs<std::int32_t> inverse;
  std::int32_t* sources;
  std::int64_t* counts;
  unsigned pairs, pairs_of_block, blocks;  // the last block also has what remains
  int experts, bits;

  __device__ __forceinline__ unsigned first(unsigned block) const { return block * pairs_of_block; }
  __device__ __forceinline__ unsigned last(unsigned block) const {
    return block + 1 == blocks ? pairs : first(block + 1);
  }
  // Of a block and an expert: its count, then the place of its first pair.
  __device__ __forceinline__ std::int32_t& kept(unsigned block, int expert) const {
    return inverse[first(block) + static_cast<unsigned>(expert)];
  }
};

__global__ void count_pairs_kernel(Sort sort) {
  const unsigned block = blockIdx.x;
  count_pairs(sort.ids, sort.first(block), sort.last(block), sort.experts);
  for (int e = static_cast<int>(threadIdx.x); e < sort.experts; e += kCountThreads) {
    sort.kept(block, e) = counters()[e];
  }
}

__global__ void start_places_kernel(Sort sort) {
  for (int e = static_cast<int>(threadIdx.x); e < sort.experts; e += kStartThreads) {
    std::int32_t total = 0;
    for (unsigned block = 0; block < sort.blocks; ++block) total += sort.kept(block, e);
    counters()[e] = total;
    sort.counts[e] = total;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) exclusive_scan(counters(), sort.experts);
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < sort.experts; e += kStartThreads) {
    std::int32_t start = counters()[e];
    for (unsigned block = 0; block < sort.blocks; ++block) {
      const std::int32_t count = sort.kept(block, e);
      sort.kept(block, e) = start;
      start += count;
    }
  }
}

// One warp a block.
__global__ void take_places_kernel(Sort sort) {
  const unsigned block = blockIdx.x;
  const int lane = static_cast<int>(lane_index());
  if (sort.blocks == 1) {
    count_pairs(sort.ids, 0, sort.pairs, sort.experts);
    for (int e = lane; e < sort.experts; e += kWarp) sort.counts[e] = counters()[e];
    exclusive_scan(counters(), sort.experts);
  } else {
    for (int e = lane; e < sort.experts; e += kWarp) counters()[e] = sort.kept(block, e);
    __syncwarp();
  }
  take_places(sort.ids, sort.first(block), sort.last(block), sort.bits,
              [&](unsigned pair, std::int32_t, std::int32_t place) {
                sort.inverse[pair] = place;
                if (place >= 0) {
                  sort.sources[place] = static_cast<std::int32_t>(pair / sort.ids.chosen);
                }
              });
}

int bits_of(std::int64_t experts) {
  int bits = 0;
  while (experts >> bits) ++bits;
  return bits;
}

void sort_rows_cuda(const SortArgs& args) {
  const std::int64_t pairs = args.rows * args.chosen;
  std::int64_t of_block = ceil_div(pairs, kMostBlocks);
  for (const std::int64_t least : {kLeastPairs, args.experts}) {
    if (of_block < least) of_block = least;
  }
  const std::int64_t blocks = pairs < of_block ? 1 : pairs / of_block;
  auto* counts = Mailbox::of_thread().room<std::int64_t>(static_cast<std::size_t>(args.experts));
  const auto chosen = static_cast<unsigned>(args.chosen);
  const Sort sort{{args.ids, args.ids_stride, chosen},
                  {args.inverse, args.inverse_stride, chosen},
                  args.sources,
                  counts,
                  static_cast<unsigned>(pairs),
                  static_cast<unsigned>(of_block),
                  static_cast<unsigned>(blocks),
                  static_cast<int>(args.experts),
                  bits_of(args.experts)};
  const std::size_t bytes = counter_bytes(args.experts);
  if (blocks > 1) {
    launch(count_pairs_kernel, dim3{sort.blocks}, dim3{kCountThreads}, bytes, args.on.stream, sort);
    launch(start_places_kernel, dim3{1}, dim3{kStartThreads}, bytes, args.on.stream, sort);
  }
  launch(take_places_kernel, dim3{sort.blocks}, dim3{kWarp}, bytes, args.on.stream, sort);
  synchronize(args.on.stream);
  for (std::int64_t e = 0; e < args.experts; ++e) args.counts[e] = counts[e];
}

// Segments of consecutive rows, one block each. What the host tells and is told lies in its memory.
struct Segments {
  Pairs<std::int32_t> ids;
  const std::int64_t* starts;  // [segments + 1], pairs
  std::int32_t* numbers;       // [segments, experts]
  int experts, bits;

  __device__ __forceinline__ unsigned first() const {
    return static_cast<unsigned>(starts[blockIdx.x]);
  }
  __device__ __forceinline__ unsigned last() const {
    return static_cast<unsigned>(starts[blockIdx.x + 1]);
  }
  __device__ __forceinline__ std::int32_t& number(int expert) const {
    return numbers[std::int64_t{blockIdx.x} * experts + expert];
  }
};

// Numbers become counts.
__global__ void count_experts_kernel(Segments segments) {
  count_pairs(segments.ids, segments.first(), segments.last(), segments.experts);
  for (int e = static_cast<int>(threadIdx.x); e < segments.experts; e += kCountThreads) {
    segments.number(e) = counters()[e];
  }
}

// Numbers are the room of each expert, and become what of it was taken. One warp a block.
__global__ void drop_overflow_kernel(Segments segments) {
  std::int32_t* room = counters() + segments.experts;
  const int lane = static_cast<int>(lane_index());
  for (int e = lane; e < segments.experts; e += kWarp) {
    counters()[e] = 0;
    room[e] = segments.number(e);
  }
  __syncwarp();
  take_places(segments.ids, segments.first(), segments.last(), segments.bits,
              [&](unsigned pair, std::int32_t id, std::int32_t place) {
                if (id >= 0 && place >= room[id]) segments.ids[pair] = -1;
              });
  for (int e = lane; e < segments.experts; e += kWarp) {
    segments.number(e) = min(counters()[e], room[e]);
  }
}

Segments new_segments(const SegmentArgs& args) {
  const auto starts = static_cast<std::size_t>(args.segments + 1);
  const auto numbers = static_cast<std::size_t>(args.segments * args.experts);
  auto* memory = Mailbox::of_thread().room<std::int64_t>(starts + (numbers + 1) / 2);
  memory[0] = 0;
  for (std::int64_t i = 0; i < args.segments; ++i) {
    memory[i + 1] = memory[i] + args.segment_rows[i] * args.chosen;
  }
  return {{args.ids, args.ids_stride, static_cast<unsigned>(args.chosen)},
          memory,
          reinterpret_cast<std::int32_t*>(memory + starts),
          static_cast<int>(args.experts),
          bits_of(args.experts)};
}

// Calls visit(count of the caller's, number) for each segment and expert.
template <class Visit>
void for_each_number(const SegmentArgs& args, const Segments& segments, Visit&& visit) {
  for (std::int64_t segment = 0; segment < args.segments; ++segment) {
    for (std::int64_t e = 0; e < args.experts; ++e) {
      visit(segment, args.counts[segment * args.counts_stride + e],
            segments.numbers[segment * args.experts + e]);
    }
  }
}

void count_experts_cuda(const SegmentArgs& args) {
  const Segments segments = new_segments(args);
  launch(count_experts_kernel, dim3{static_cast<unsigned>(args.segments)}, dim3{kCountThreads},
         counter_bytes(args.experts), args.on.stream, segments);
  synchronize(args.on.stream);
  for_each_number(args, segments,
                  [](std::int64_t, std::int64_t& count, std::int32_t counted) { count = counted; });
}

void drop_overflow_cuda(const SegmentArgs& args) {
  const Segments segments = new_segments(args);
  const std::int64_t pairs = args.rows * args.chosen;
  for_each_number(args, segments,
                  [&](std::int64_t segment, std::int64_t& used, std::int32_t& room) {
                    const std::int64_t left = args.capacity[segment] - used;
                    room = static_cast<std::int32_t>(left < 0 ? 0 : left < pairs ? left : pairs);
                  });
  launch(drop_overflow_kernel, dim3{static_cast<unsigned>(args.segments)}, dim3{kWarp},
         2 * counter_bytes(args.experts), args.on.stream, segments);
  synchronize(args.on.stream);
  for_each_number(args, segments,
                  [](std::int64_t, std::int64_t& used, std::int32_t taken) { used += taken; });
}

}  // namespace

const RoutingKernels routing_kernels = {sort_rows_cuda, count_experts_cuda, drop_overflow_cuda};

}  // namespace pympa::cuda
