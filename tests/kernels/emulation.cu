// Kernels that keep or break a rule of CUDA each; prints one line for each, which test_emulation.py
// expects.

#include <cstdio>
#include <vector>

#include "cuda/mma.hpp"

using namespace pympa::cuda;

namespace {

struct Sums {
  float of_warp[8];
};

__global__ void sum_block(const float* x, float* sum, bool waits) {
  Sums& sums = block_shared<Sums>();
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  float value = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(0xffffffffU, value, bits);
  if (threadIdx.x % kWarp == 0) sums.of_warp[warp] = value;
  if (waits) __syncthreads();
  if (threadIdx.x > 0) return;
  sum[blockIdx.x] = 0.0F;
  for (const float one : sums.of_warp) sum[blockIdx.x] += one;
}

__global__ void copy_later(const float* from, float* to, bool waits) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  copy_async(shared + 4 * threadIdx.x, from + 4 * threadIdx.x, 12);
  commit_copies();
  if (waits) wait_for_copies<0>();
  for (int i = 0; i < 4; ++i) to[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
}

// d [16, 8] = a [16, 16] b [16, 8], all of one warp.
__global__ void multiply(const Half* a, const Half* b, float* d) {
  Half* shared = reinterpret_cast<Half*>(dynamic_shared());
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += kWarp) shared[i] = a[i];
  for (int i = static_cast<int>(threadIdx.x); i < 128; i += kWarp) {
    shared[256 + i / 8 * 16 + i % 8] = b[i];
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x);
  std::uint32_t a_part[4], b_part[4];
  load_matrices<false>(a_part, shared + row_of_a(lane) * 16 + chunk_of_a(lane) * 8);
  load_matrices<true>(b_part, shared + 256 + row_of_a(lane) * 16);
  float sums[4] = {};
  mma<Half>(sums, a_part, b_part[0], b_part[1]);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

__global__ void leave_barrier_out() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void diverge() {
  if (threadIdx.x < 10) {
    __syncwarp();
  } else {
    __shfl_sync(0xffffffffU, 1, 0);
  }
}

__global__ void leave_early() {
  if (threadIdx.x < 10) return;
  __syncwarp();
}

__global__ void write_outside() { dynamic_shared()[64 + threadIdx.x] = 1; }

__global__ void load_outside() {
  std::uint32_t to[4];
  load_matrices<false>(to, dynamic_shared() + 16 * threadIdx.x);
}

void expect_error(const char* name, void (*kernel)()) {
  try {
    launch(kernel, dim3{2}, dim3{64}, 64, nullptr);
    std::printf("%s: nothing\n", name);
  } catch (const std::runtime_error& error) {
    std::printf("%s: %s\n", name, error.what());
  }
}

}  // namespace

int main() {
  const std::vector<float> x(512, 1.0F);
  float sums[2];
  for (const bool waits : {true, false}) {
    launch(sum_block, dim3{2}, dim3{256}, 0, nullptr, x.data(), sums, waits);
    std::printf("sum %s: %g\n", waits ? "after a barrier" : "without", sums[0] + sums[1]);
  }
  alignas(16) float from[128], to[128];
  for (int i = 0; i < 128; ++i) from[i] = static_cast<float>(i);
  for (const bool waits : {true, false}) {
    launch(copy_later, dim3{1}, dim3{32}, sizeof(from), nullptr, from, to, waits);
    std::printf("copy %s: %g %g\n", waits ? "after a wait" : "without", to[126], to[127]);
  }
  Half a[256], b[128];
  float d[128], wrong = 0.0F;
  for (int i = 0; i < 256; ++i) a[i] = from_float<Half>(static_cast<float>(i % 7 - 3));
  for (int i = 0; i < 128; ++i) b[i] = from_float<Half>(static_cast<float>(i % 5 - 2));
  launch(multiply, dim3{1}, dim3{32}, 1024, nullptr, a, b, d);
  for (int i = 0; i < 128; ++i) {
    float sum = 0.0F;
    for (int k = 0; k < 16; ++k) sum += to_float(a[i / 8 * 16 + k]) * to_float(b[k * 8 + i % 8]);
    wrong += std::fabs(sum - d[i]);
  }
  std::printf("mma: %g wrong\n", wrong);
  expect_error("barrier", leave_barrier_out);
  expect_error("divergence", diverge);
  expect_error("early end", leave_early);
  expect_error("write", write_outside);
  expect_error("load", load_outside);
}
