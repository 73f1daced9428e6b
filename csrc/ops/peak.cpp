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

typedef std::uint64_t Lanes __attribute__((vector_size(16)));
constexpr std::int64_t kLine = 64 / sizeof(Lanes);

// Reads `lines` lines as kStreams runs side by side, each asked for `ahead` lines in advance (0:
// not at all); returns the bytes read.
template <int kStreams>
double read_once(const Lanes* buffer, std::int64_t lines, std::int64_t ahead) {
  const std::int64_t each = lines / kStreams;
  Lanes sums[kLine] = {};  // independent, so that loads and not additions are the limit
  for (std::int64_t i = 0; i < each; ++i) {
    for (int stream = 0; stream < kStreams; ++stream) {
      const Lanes* line = buffer + (stream * each + i) * kLine;
      if (ahead > 0) __builtin_prefetch(line + ahead * kLine);
      for (std::int64_t j = 0; j < kLine; ++j) sums[j] += line[j];
    }
  }
  asm volatile("" : : "m"(sums));  // the sums count as used
  return static_cast<double>(each * kStreams * kLine) * sizeof(Lanes);
}

// A way of reading: cores differ in how many runs they follow, and in how far they look ahead.
struct Reading {
  double (*read)(const Lanes*, std::int64_t, std::int64_t);
  std::int64_t ahead;
};

constexpr Reading kReadings[] = {
    {read_once<1>, 0},  {read_once<2>, 0},  {read_once<4>, 0},  {read_once<8>, 0},
    {read_once<1>, 32}, {read_once<2>, 32}, {read_once<4>, 32}, {read_once<8>, 32},
    {read_once<1>, 96}, {read_once<2>, 96}, {read_once<4>, 96}, {read_once<8>, 96},
};

}  // namespace

double product_peak(DType dtype, Isa isa, double seconds) {
  check_seconds("product_peak", seconds);
  const PeakKernels& kernels = PYMPA_SELECT_KERNELS(isa_for(dtype, isa), peak_kernels);
  constexpr std::int64_t kRounds = 100'000;
  kernels.product_rounds(dtype, kRounds);  // wakes the wide units up
  return rate_over(seconds, [&] { return kernels.product_rounds(dtype, kRounds); });
}

double read_bandwidth(std::int64_t bytes, double seconds, std::int64_t tries) {
  check_seconds("read_bandwidth", seconds);
  check_at_least("read_bandwidth", "bytes", bytes, 4096);
  check_at_least("read_bandwidth", "tries", tries, 1);
  const std::int64_t lines = bytes / 64;
  std::vector<std::uint64_t> memory(static_cast<std::size_t>(lines + 1) * 8, 1);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  const auto* buffer = reinterpret_cast<const Lanes*>((address + 63) / 64 * 64);
  const auto rate_of = [&](const Reading& way, double least) {
    return rate_over(least, [&] { return way.read(buffer, lines, way.ahead); });
  };
  double best = 0.0;
  const Reading* fastest = kReadings;
  for (const Reading& way : kReadings) {
    const double rate = rate_of(way, seconds / 8);
    if (rate > best) fastest = &way;
    best = std::max(best, rate);
  }
  for (std::int64_t i = 0; i < tries; ++i) best = std::max(best, rate_of(*fastest, seconds));
  return best;
}

}  // namespace pympa
