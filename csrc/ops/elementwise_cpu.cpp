// Elementwise sums of rows [rows, columns] in float32, rounded once, and the cap on logits.

#include "cpu/convert.hpp"
#include "cpu/math.hpp"
#include "cpu/parallel.hpp"
#include "ops/elementwise.hpp"

namespace pympa::PYMPA_ISA {

namespace {

template <class T>
void add_rows(const AddArgs& args, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* a = static_cast<const T*>(args.a) + row * args.a_stride;
    const T* b = static_cast<const T*>(args.b) + row * args.b_stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    for (int64_t i = 0; i < args.columns; i += W) {
      const int64_t count = args.columns - i;
      store(out + i, load(a + i, count) + load(b + i, count), count);
    }
  }
}

template <class T>
void sum_rows(const SumArgs& args, int64_t first, int64_t last) {
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.row_stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    for (int64_t i = 0; i < args.columns; i += W) {
      const int64_t count = args.columns - i;
      V sums{};
      for (int64_t part = 0; part < args.parts; ++part) {
        sums += load(x + part * args.part_stride + i, count);
      }
      if (bias) sums += load(bias + i, count);
      store(out + i, sums, count);
    }
  }
}

void add_cpu(const AddArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    for_row_pieces(args.on.threads, args.rows,
                   [&](int64_t first, int64_t last) { add_rows<T>(args, first, last); });
  });
}

void sum_partials_cpu(const SumArgs& args) {
  with_type(args.dtype, [&]<class T>() {
    for_row_pieces(args.on.threads, args.rows,
                   [&](int64_t first, int64_t last) { sum_rows<T>(args, first, last); });
  });
}

void softcap_cpu(const SoftcapArgs& args) {
  const V cap = splat(args.cap);
  for_row_pieces(args.on.threads, args.rows, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      float* x = args.x + row * args.stride;
      for (int64_t i = 0; i < args.columns; i += W) {
        const int64_t count = args.columns - i;
        store(x + i, cap * tanh(load(x + i, count) / cap), count);
      }
    }
  });
}

}  // namespace

const ElementwiseKernels elementwise_kernels = {add_cpu, sum_partials_cpu, softcap_cpu};

}  // namespace pympa::PYMPA_ISA
