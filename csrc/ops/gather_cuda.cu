// Rows by index [rows] -> out [rows, columns], a copy of bytes. It moves twice the bytes of out,
// and the index.

#include "cuda/words.hpp"
#include "ops/gather.hpp"

namespace pympa::cuda {

namespace {

struct Gather {
  const char* source;
  std::int64_t source_stride, source_rows, first_row;  // strides in bytes
  const std::int32_t* index;
  char* out;
  std::int64_t out_stride, rows, words;
};

template <class Word>
__global__ void gather_rows_kernel(Gather args) {
  for_each_item(args.rows, args.words, [&](std::int64_t row, std::int64_t i) {
    const std::int64_t local = args.index[row] - args.first_row;
    Word word{};
    if (local >= 0 && local < args.source_rows) {
      word = reinterpret_cast<const Word*>(args.source + local * args.source_stride)[i];
    }
    reinterpret_cast<Word*>(args.out + row * args.out_stride)[i] = word;
  });
}

void gather_rows_cuda(const GatherArgs& args) {
  Gather gather{static_cast<const char*>(args.source),
                args.source_stride_bytes,
                args.source_rows,
                args.first_row,
                args.index,
                static_cast<char*>(args.out),
                args.out_stride_bytes,
                args.rows,
                0};
  const auto lengths = static_cast<std::uintptr_t>(args.source_stride_bytes |
                                                   args.out_stride_bytes | args.row_bytes);
  with_word(address_bits(args.source) | address_bits(args.out) | lengths, [&]<class Word>() {
    gather.words = args.row_bytes / static_cast<std::int64_t>(sizeof(Word));
    const auto [grid, block] = row_grid(args.rows, gather.words);
    launch(gather_rows_kernel<Word>, grid, block, 0, args.on.stream, gather);
  });
}

}  // namespace

const GatherKernels gather_kernels = {gather_rows_cuda};

}  // namespace pympa::cuda
