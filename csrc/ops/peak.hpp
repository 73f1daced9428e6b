// The peak rates of one core, which benchmarks compare with.
#pragma once

#include <cstdint>

#include "core/dispatch.hpp"

namespace pympa {

struct PeakKernels {
  // Runs about `rounds` rounds of products in registers; returns the flops done.
  double (*product_rounds)(DType dtype, std::int64_t rounds);
};

PYMPA_DECLARE_KERNELS(PeakKernels, peak_kernels)

// Flop/s of one core on the instruction that products of `dtype` use.
double product_peak(DType dtype, Isa isa, double seconds);

// Bytes/s that one core reads from a buffer of `bytes` bytes, swept again and again: the best of
// some tries of at least `seconds`, in the way that is fastest here.
double read_bandwidth(std::int64_t bytes, double seconds, std::int64_t tries);

}  // namespace pympa
