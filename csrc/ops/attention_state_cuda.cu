// Operations on running states of attention on a GPU: start one, merge two, normalise one.
//
//   m = max(m_a, m_b); sum = sum_a e^(m_a - m) + sum_b e^(m_b - m); out [rows, v_head_dim] likewise
//   o = out / sum; lse = m + ln(sum)
//
// Each warp has one row. The kernels read and write memory once and are limited by its bandwidth.
// `out` of a row that has seen no key is not read.

#include "cuda/convert.hpp"
#include "ops/attention.hpp"

namespace pympa::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;  // of a block
constexpr float kInfinity = HUGE_VALF;

__device__ __forceinline__ std::int64_t row_of_warp() {
  return std::int64_t{blockIdx.x} * kRows + threadIdx.x / kWarp;
}

__device__ __forceinline__ bool has_seen_keys(float row_max, float row_sum) {
  return row_max != -kInfinity || row_sum != 0.0F;
}

// `out` of a row is not read before something was folded into it, so it stays as it is.
__global__ void __launch_bounds__(kThreads) start_kernel(const StartArgs args) {
  const std::int64_t row = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= args.rows) return;
  args.state.row_max[row] = -kInfinity;
  args.state.row_sum[row] = 0.0F;
}

// A row with a sink counts as one that has seen a key: its `out` will be read.
template <class T>
__global__ void __launch_bounds__(kThreads) start_with_sinks_kernel(const StartArgs args) {
  const std::int64_t row = row_of_warp();
  if (row >= args.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane == 0) {
    args.state.row_max[row] = to_float(static_cast<const T*>(args.sinks)[row % args.heads]);
    args.state.row_sum[row] = 1.0F;
  }
  float* out = args.state.out + row * args.v_head_dim;
  for (std::int64_t i = lane; i < args.v_head_dim; i += kWarp) out[i] = 0.0F;
}

template <int N>
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeArgs args) {
  using Columns = Vector<float, N>;
  const std::int64_t row = row_of_warp();
  if (row >= args.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const float a = args.into.row_max[row], b = args.other.row_max[row];
  const float a_sum = args.into.row_sum[row], b_sum = args.other.row_sum[row];
  if (!has_seen_keys(b, b_sum)) return;
  // b is kept where it is NaN, so that a broken state cannot hide.
  const float largest = a > b ? a : b;
  const float shift = largest == -kInfinity ? 0.0F : largest;
  const float a_scale = expf(a - shift), b_scale = expf(b - shift);
  __syncwarp();  // all lanes have read what lane 0 writes
  if (lane == 0) {
    args.into.row_max[row] = largest;
    args.into.row_sum[row] = fmaf(b_sum, b_scale, a_sum * a_scale);
  }
  const bool fresh = !has_seen_keys(a, a_sum);
  float* into = args.into.out + row * args.v_head_dim;
  const float* other = args.other.out + row * args.v_head_dim;
  for (std::int64_t i = lane * N; i < args.v_head_dim; i += kWarp * N) {
    Columns x{};
    if (!fresh) x = *reinterpret_cast<const Columns*>(into + i);
    const Columns y = *reinterpret_cast<const Columns*>(other + i);
#pragma unroll
    for (int j = 0; j < N; ++j) x.at[j] = fmaf(y.at[j], b_scale, x.at[j] * a_scale);
    *reinterpret_cast<Columns*>(into + i) = x;
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishArgs args) {
  const std::int64_t row = row_of_warp();
  if (row >= args.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const float sum = args.state.row_sum[row];
  const bool masked = sum == 0.0F;
  if (lane == 0) args.lse[row] = masked ? -kInfinity : args.state.row_max[row] + logf(sum);
  const float* out = args.state.out + row * args.v_head_dim;
  T* o = static_cast<T*>(args.o) + row * args.v_head_dim;
  for (std::int64_t i = lane * N; i < args.v_head_dim; i += kWarp * N) {
    Vector<float, N> x{};
    if (!masked) x = *reinterpret_cast<const Vector<float, N>*>(out + i);
    Vector<T, N> y;
#pragma unroll
    for (int j = 0; j < N; ++j) y.at[j] = from_float<T>(masked ? 0.0F : x.at[j] / sum);
    *reinterpret_cast<Vector<T, N>*>(o + i) = y;
  }
}

bool is_aligned(const void* data, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % bytes == 0;
}

dim3 blocks_for(std::int64_t rows, std::int64_t rows_of_block) {
  return dim3{static_cast<unsigned>((rows + rows_of_block - 1) / rows_of_block)};
}

void start_cuda(const StartArgs& args) {
  if (args.rows == 0) return;
  if (!args.sinks) {
    launch(start_kernel, blocks_for(args.rows, kThreads), dim3{kThreads}, 0, args.on.stream, args);
    return;
  }
  with_type(args.dtype, [&]<class T>() {
    launch(start_with_sinks_kernel<T>, blocks_for(args.rows, kRows), dim3{kThreads}, 0,
           args.on.stream, args);
  });
}

void merge_cuda(const MergeArgs& args) {
  if (args.rows == 0) return;
  const bool wide =
      args.v_head_dim % 4 == 0 && is_aligned(args.into.out, 16) && is_aligned(args.other.out, 16);
  launch(wide ? merge_kernel<4> : merge_kernel<1>, blocks_for(args.rows, kRows), dim3{kThreads}, 0,
         args.on.stream, args);
}

void finish_cuda(const FinishArgs& args) {
  if (args.rows == 0) return;
  with_type(args.dtype, [&]<class T>() {
    const bool wide = args.v_head_dim % 4 == 0 && is_aligned(args.state.out, 16) &&
                      is_aligned(args.o, 4 * sizeof(T));
    launch(wide ? finish_kernel<T, 4> : finish_kernel<T, 1>, blocks_for(args.rows, kRows),
           dim3{kThreads}, 0, args.on.stream, args);
  });
}

}  // namespace

const AttentionStateKernels attention_state_kernels = {start_cuda, merge_cuda, finish_cuda};

}  // namespace pympa::cuda
