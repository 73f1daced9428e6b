// Work items over threads. Items are independent and each is computed alike on any thread, so the
// thread count never changes a result.
#pragma once

#include <omp.h>

#ifdef __SANITIZE_THREAD__
#include <atomic>
#include <thread>
#include <vector>
#endif

#include "cpu/simd.hpp"

namespace pympa::PYMPA_ISA {

// Calls run(item, thread) for each item; no parallel region for one thread or one item.
template <class Run>
PYMPA_INLINE void for_each_item(int threads, int64_t items, Run&& run) {
  if (threads == 1 || items <= 1) {
    for (int64_t item = 0; item < items; ++item) run(item, 0);
    return;
  }
#ifdef __SANITIZE_THREAD__
  // ThreadSanitizer cannot see how OpenMP's runtime orders its threads; these it can.
  std::atomic<int64_t> next{0};
  std::vector<std::thread> team;
  for (int thread = 0; thread < threads; ++thread) {
    team.emplace_back([&, thread] {
      for (int64_t item; (item = next++) < items;) run(item, thread);
    });
  }
  for (std::thread& member : team) member.join();
#else
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) run(item, thread);
  }
#endif
}

// Calls run(first, last) for one contiguous piece of the rows on each thread.
template <class Run>
PYMPA_INLINE void for_row_pieces(int threads, int64_t rows, Run&& run) {
  const int64_t pieces = min_of(threads, rows);
  for_each_item(threads, pieces, [&](int64_t piece, int) {
    run(rows * piece / pieces, rows * (piece + 1) / pieces);
  });
}

}  // namespace pympa::PYMPA_ISA
