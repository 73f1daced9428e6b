// Routing of rows: chosen experts are counted, sorted and dropped, one after the other.

#include "cpu/parallel.hpp"
#include "ops/experts.hpp"

namespace pympa::PYMPA_ISA {

namespace {

// Calls visit(segment, id) for each choice that is not dropped, row by row.
template <class Visit>
void for_each_choice(const SegmentArgs& args, Visit&& visit) {
  int64_t row = 0;
  for (int64_t segment = 0; segment < args.segments; ++segment) {
    for (const int64_t last = row + args.segment_rows[segment]; row < last; ++row) {
      int32_t* ids = args.ids + row * args.ids_stride;
      for (int64_t i = 0; i < args.chosen; ++i) {
        if (ids[i] >= 0) visit(segment, ids[i]);
      }
    }
  }
}

// A stable counting sort.
void sort_rows_cpu(const SortArgs& args) {
  int64_t* next = args.counts;
  for (int64_t e = 0; e < args.experts; ++e) next[e] = 0;
  for (int64_t row = 0; row < args.rows; ++row) {
    const int32_t* ids = args.ids + row * args.ids_stride;
    for (int64_t i = 0; i < args.chosen; ++i) {
      if (ids[i] >= 0) ++next[ids[i]];
    }
  }
  // From here on, the place of each expert's next row.
  int64_t start = 0;
  for (int64_t e = 0; e < args.experts; ++e) {
    const int64_t count = next[e];
    next[e] = start;
    start += count;
  }
  for (int64_t row = 0; row < args.rows; ++row) {
    const int32_t* ids = args.ids + row * args.ids_stride;
    int32_t* inverse = args.inverse + row * args.inverse_stride;
    for (int64_t i = 0; i < args.chosen; ++i) {
      inverse[i] = ids[i] < 0 ? -1 : static_cast<int32_t>(next[ids[i]]++);
      if (ids[i] >= 0) args.sources[inverse[i]] = static_cast<int32_t>(row);
    }
  }
  // Each expert's rows now end where those of the next one start.
  for (int64_t e = args.experts - 1; e > 0; --e) next[e] -= next[e - 1];
}

void count_experts_cpu(const SegmentArgs& args) {
  for (int64_t segment = 0; segment < args.segments; ++segment) {
    for (int64_t e = 0; e < args.experts; ++e) args.counts[segment * args.counts_stride + e] = 0;
  }
  for_each_choice(args, [&](int64_t segment, int32_t& id) {
    ++args.counts[segment * args.counts_stride + id];
  });
}

void drop_overflow_cpu(const SegmentArgs& args) {
  for_each_choice(args, [&](int64_t segment, int32_t& id) {
    int64_t& taken = args.counts[segment * args.counts_stride + id];
    if (taken < args.capacity[segment]) {
      ++taken;
    } else {
      id = -1;
    }
  });
}

}  // namespace

const RoutingKernels routing_kernels = {sort_rows_cpu, count_experts_cpu, drop_overflow_cpu};

}  // namespace pympa::PYMPA_ISA
