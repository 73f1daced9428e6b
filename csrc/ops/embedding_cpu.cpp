// Embedding lookup: ids [rows] -> out [rows, d_model], a copy of bytes.

#include "cpu/parallel.hpp"
#include "ops/embedding.hpp"

namespace pympa::PYMPA_ISA {

namespace {

void embed_cpu(const EmbedArgs& args) {
  const char* table = static_cast<const char*>(args.table);
  char* out = static_cast<char*>(args.out);
  const size_t bytes = static_cast<size_t>(args.row_bytes);
  for_row_pieces(args.threads, args.rows, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t local = args.ids[row] - args.first_row;
      char* target = out + row * args.out_stride_bytes;
      if (local >= 0 && local < args.table_rows) {
        __builtin_memcpy(target, table + local * args.table_stride_bytes, bytes);
      } else {
        __builtin_memset(target, 0, bytes);
      }
    }
  });
}

}  // namespace

const EmbeddingKernels embedding_kernels = {embed_cpu};

}  // namespace pympa::PYMPA_ISA
