// Rows by index [rows] -> out [rows, columns], a copy of bytes.

#include "cpu/parallel.hpp"
#include "ops/gather.hpp"

namespace pympa::PYMPA_ISA {

namespace {

void gather_rows_cpu(const GatherArgs& args) {
  const char* source = static_cast<const char*>(args.source);
  char* out = static_cast<char*>(args.out);
  const size_t bytes = static_cast<size_t>(args.row_bytes);
  for_row_pieces(args.on.threads, args.rows, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t local = args.index[row] - args.first_row;
      char* target = out + row * args.out_stride_bytes;
      if (local >= 0 && local < args.source_rows) {
        __builtin_memcpy(target, source + local * args.source_stride_bytes, bytes);
      } else {
        __builtin_memset(target, 0, bytes);
      }
    }
  });
}

}  // namespace

const GatherKernels gather_kernels = {gather_rows_cpu};

}  // namespace pympa::PYMPA_ISA
