// Products in registers: the rate that no product of this ISA can exceed.

#if PYMPA_ISA_LEVEL == 4
#include "cpu/amx_split.hpp"
#endif
#include "cpu/tile.hpp"
#include "ops/peak.hpp"

#if defined(__x86_64__)
#define PYMPA_VECTOR_REGISTER "v"
#else
#define PYMPA_VECTOR_REGISTER "w"
#endif

namespace pympa::PYMPA_ISA {

namespace {

// Independent sums of one tile: enough to hide the latency of every ISA here.
constexpr int kSums = kStrip * kPanelVectors;

#if PYMPA_ISA_LEVEL == 4
// Fewer rounds, since one has about 64 times the work.
template <class T>
double rounds_of_tiles(int64_t rounds) {
  TileScope tiles;
  rounds = max_of(rounds / 64, 1);
  for (int64_t round = 0; round < rounds; ++round) {
    multiply_tiles<0, kTileA, kTileB>();
    multiply_tiles<1, kTileA, kTileB + 1>();
    multiply_tiles<2, kTileA + 1, kTileB>();
    multiply_tiles<3, kTileA + 1, kTileB + 1>();
  }
  constexpr double kFlops = 4 * 2.0 * kTileRows * kTileRows * kTileTerms;
  return kFlops / Split<T>::kProducts * static_cast<double>(rounds);
}
#endif

template <class Math>
double rounds_of(int64_t rounds) {
  const typename Math::Group zero{};
  auto a = Math::broadcast(&zero);
  auto b = a;
  V sums[kSums] = {};
  // Hides that all sums are equal, or the compiler would keep only one.
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+" PYMPA_VECTOR_REGISTER(sums[i]));
  for (int64_t round = 0; round < rounds; ++round) {
    // Hides the factors' values, or the compiler would hoist the products.
    asm volatile("" : "+" PYMPA_VECTOR_REGISTER(a), "+" PYMPA_VECTOR_REGISTER(b));
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = Math::dot(sums[i], a, b);
  }
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) asm volatile("" : : PYMPA_VECTOR_REGISTER(sums[i]));
  return 2.0 * Math::kDepth * W * kSums * static_cast<double>(rounds);
}

double product_rounds(DType dtype, int64_t rounds) {
  double flops = 0.0;
#if PYMPA_ISA_LEVEL == 4
  with_type(dtype, [&]<class T>() { flops = rounds_of_tiles<T>(rounds); });
#else
  with_type(dtype, [&]<class T>() { flops = rounds_of<typename MathOf<T>::Attention>(rounds); });
#endif
  return flops;
}

}  // namespace

const PeakKernels peak_kernels = {product_rounds};

}  // namespace pympa::PYMPA_ISA
