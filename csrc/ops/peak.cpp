#include "ops/peak.hpp"

#include <algorithm>
#include <chrono>
#include <vector>

#include "core/check.hpp"

namespace pympa {

namespace {

// Returns the work per second of work() calls over at least `seconds`.
template <class Work>
double rate_over(double seconds, Work&& work) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = Clock::now();
  double done = 0.0, elapsed = 0.0;
  do {
    done += work();
    elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
  } while (elapsed < seconds);
  return done / elapsed;
}

void check_seconds(const char* op, double seconds) {
  if (!(seconds > 0.0 && seconds <= 60.0)) {
    fail(op, "seconds", "a number in (0, 60]", std::to_string(seconds));
  }
}

// Independent sums, so that loads and not additions are the limit.
constexpr std::int64_t kSums = 8;

}  // namespace

double fma_peak(DType dtype, Isa isa, double seconds) {
  check_seconds("fma_peak", seconds);
  const PeakKernels& kernels = PYMPA_SELECT_KERNELS(isa_for(dtype, isa), peak_kernels);
  constexpr std::int64_t kRounds = 100'000;
  kernels.fma_rounds(dtype, kRounds);  // wakes the wide units up
  return rate_over(seconds, [&] { return kernels.fma_rounds(dtype, kRounds); });
}

double read_bandwidth(std::int64_t bytes, double seconds, std::int64_t tries) {
  check_seconds("read_bandwidth", seconds);
  check_at_least("read_bandwidth", "bytes", bytes, 4096);
  check_at_least("read_bandwidth", "tries", tries, 1);
  typedef std::uint64_t Lanes __attribute__((vector_size(16)));
  const std::int64_t count = bytes / static_cast<std::int64_t>(sizeof(Lanes)) / kSums * kSums;
  std::vector<std::uint64_t> buffer(static_cast<std::size_t>(count) * 2, 1);
  const Lanes* lanes = reinterpret_cast<const Lanes*>(buffer.data());
  const auto sweep = [&] {
    Lanes sums[kSums] = {};
    for (std::int64_t i = 0; i < count; i += kSums) {
      for (std::int64_t j = 0; j < kSums; ++j) sums[j] += lanes[i + j];
    }
    asm volatile("" : : "m"(sums));  // the sums count as used
    return static_cast<double>(count) * sizeof(Lanes);
  };
  double best = 0.0;
  for (std::int64_t i = 0; i < tries; ++i) best = std::max(best, rate_over(seconds, sweep));
  return best;
}

}  // namespace pympa
