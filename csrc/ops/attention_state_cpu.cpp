// Operations on running states of attention: start one, merge two, normalise one.
//
//   m = max(m_a, m_b); sum = sum_a e^(m_a - m) + sum_b e^(m_b - m); out [rows, v_head_dim] likewise
//   o = out / sum; lse = m + ln(sum)

#include "cpu/convert.hpp"
#include "cpu/math.hpp"
#include "cpu/parallel.hpp"
#include "ops/attention.hpp"

namespace pympa::PYMPA_ISA {

namespace {

void start_cpu(const StartArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    const T* sinks = static_cast<const T*>(args.sinks);
    for_row_pieces(args.on.threads, args.rows, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        args.state.row_max[row] = sinks ? load(sinks + row % args.heads, 1)[0] : -kInfinity;
        args.state.row_sum[row] = sinks ? 1.0f : 0.0f;
      }
      float* out = args.state.out;
      for (int64_t i = first * args.v_head_dim; i < last * args.v_head_dim; ++i) out[i] = 0.0f;
    });
  });
}

void merge_cpu(const MergeArgs& args) {
  for_row_pieces(args.on.threads, args.rows, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float a = args.into.row_max[row], b = args.other.row_max[row];
      // b is kept where it is NaN, so that a broken state cannot hide.
      const float largest = a > b ? a : b;
      const V shift = splat(largest == -kInfinity ? 0.0f : largest);
      const V scale_a = exp(splat(a) - shift), scale_b = exp(splat(b) - shift);
      args.into.row_max[row] = largest;
      args.into.row_sum[row] =
          args.into.row_sum[row] * scale_a[0] + args.other.row_sum[row] * scale_b[0];
      float* into = args.into.out + row * args.v_head_dim;
      const float* other = args.other.out + row * args.v_head_dim;
      for (int64_t i = 0; i < args.v_head_dim; i += W) {
        const int64_t count = args.v_head_dim - i;
        store(into + i, fma(load(other + i, count), scale_b, load(into + i, count) * scale_a),
              count);
      }
    }
  });
}

template <class T>
void finish_rows(const FinishArgs& args, int64_t first, int64_t last) {
  T* o = static_cast<T*>(args.o);
  for (int64_t row = first; row < last; ++row) {
    const float sum = args.state.row_sum[row];
    const bool masked = sum == 0.0f;
    args.lse[row] = masked ? -kInfinity : args.state.row_max[row] + log(splat(sum))[0];
    const V divisor = splat(masked ? 1.0f : sum);
    const float* out = args.state.out + row * args.v_head_dim;
    for (int64_t i = 0; i < args.v_head_dim; i += W) {
      const int64_t count = args.v_head_dim - i;
      store(o + row * args.v_head_dim + i, load(out + i, count) / divisor, count);
    }
  }
}

void finish_cpu(const FinishArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    for_row_pieces(args.on.threads, args.rows,
                   [&](int64_t first, int64_t last) { finish_rows<T>(args, first, last); });
  });
}

}  // namespace

const AttentionStateKernels attention_state_kernels = {start_cpu, merge_cpu, finish_cpu};

}  // namespace pympa::PYMPA_ISA
