// Rows of a vocabulary-parallel embedding table.
#pragma once

#include <cstdint>

#include "core/dispatch.hpp"

namespace pympa {

struct TensorView;

struct EmbedArgs {
  std::int64_t rows, row_bytes, table_rows, first_row;
  const std::int32_t* ids;
  const void* table;
  std::int64_t table_stride_bytes;
  void* out;
  std::int64_t out_stride_bytes;
  int threads;
};

struct EmbeddingKernels {
  void (*embed)(const EmbedArgs& args);
};

PYMPA_DECLARE_KERNELS(EmbeddingKernels, embedding_kernels)

// out[r] = table[ids[r] - first_row], zeros where the id lies outside this shard.
void embed(const TensorView& ids, const TensorView& table, std::int64_t first_row,
           const TensorView& out, int threads, Isa isa);

}  // namespace pympa
