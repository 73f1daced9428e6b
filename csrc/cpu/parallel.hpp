// Work items on threads. Items are independent, and each gives the same result on any thread.
// Threads of a team wait for each other where one needs the result of another. So the number of
// threads never changes a result.
#pragma once

#include <omp.h>

#ifdef __SANITIZE_THREAD__
#include <atomic>
#include <barrier>
#include <thread>
#include <vector>
#endif

#include "cpu/simd.hpp"

namespace pympa::PYMPA_ISA {

#ifdef __SANITIZE_THREAD__

// ThreadSanitizer cannot see how OpenMP's runtime orders its threads; these it can.
inline thread_local std::barrier<>* own_barrier = nullptr;

template <class Run>
void with_team(int threads, Run&& run) {
  std::barrier<> barrier(threads);
  std::vector<std::thread> team;
  for (int member = 0; member < threads; ++member) {
    team.emplace_back([&, member] {
      own_barrier = &barrier;
      run(member, threads);
    });
  }
  for (std::thread& member : team) member.join();
}

inline void wait_for_team() { own_barrier->arrive_and_wait(); }

template <class Run>
void share_items(int threads, int64_t items, Run&& run) {
  std::atomic<int64_t> next{0};
  with_team(threads, [&](int thread, int) {
    for (int64_t item; (item = next++) < items;) run(item, thread);
  });
}

#else

// Calls run(member, size of the team) on each thread of a team.
template <class Run>
PYMPA_INLINE void with_team(int threads, Run&& run) {
#pragma omp parallel num_threads(threads)
  run(omp_get_thread_num(), omp_get_num_threads());
}

// Waits until all members of the team that the caller belongs to are here.
PYMPA_INLINE void wait_for_team() {
#pragma omp barrier
}

template <class Run>
PYMPA_INLINE void share_items(int threads, int64_t items, Run&& run) {
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) run(item, thread);
  }
}

#endif

// Calls run(item, thread) for each item; no threads are woken for one thread or one item.
template <class Run>
PYMPA_INLINE void for_each_item(int threads, int64_t items, Run&& run) {
  if (threads == 1 || items <= 1) {
    for (int64_t item = 0; item < items; ++item) run(item, 0);
  } else {
    share_items(threads, items, run);
  }
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
