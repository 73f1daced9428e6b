// The peak rates of one core, which benchmarks compare with.
#pragma once

#include <cstdint>

#include "core/dispatch.hpp"

namespace pympa {

struct PeakKernels {
  // Runs `rounds` rounds of register-only multiply-adds; returns the flops done.
  double (*fma_rounds)(DType dtype, std::int64_t rounds);
};

PYMPA_DECLARE_KERNELS(PeakKernels, peak_kernels)

// Flop/s of one core on the multiply-add that products of `dtype` use.
double fma_peak(DType dtype, Isa isa, double seconds);

// Bytes/s that one core reads from a buffer of `bytes` bytes, swept again and again: the best of
// some tries of at least `seconds`.
double read_bandwidth(std::int64_t bytes, double seconds, std::int64_t tries);

}  // namespace pympa
