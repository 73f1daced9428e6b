// Copies rows [a, b, c, bytes]: each byte is read and written once, in words as wide as addresses
// and strides allow.

#include "cuda/words.hpp"
#include "ops/copy.hpp"

namespace pympa::cuda {

namespace {

struct Side {
  char* at;
  std::int64_t stride[kMaxRank - 1];  // bytes

  __device__ __forceinline__ char* row(std::int64_t a, std::int64_t b, std::int64_t c) const {
    return at + a * stride[0] + b * stride[1] + c * stride[2];
  }
};

template <class Word>
__global__ void copy_kernel(Side source, Side out, std::int64_t b, std::int64_t c,
                            std::int64_t rows, std::int64_t words) {
  for_each_item(rows, words, [&](std::int64_t row, std::int64_t i) {
    const std::int64_t at_a = row / c / b, at_b = row / c % b, at_c = row % c;
    const Word word = reinterpret_cast<const Word*>(source.row(at_a, at_b, at_c))[i];
    reinterpret_cast<Word*>(out.row(at_a, at_b, at_c))[i] = word;
  });
}

void copy_cuda(const CopyArgs& args) {
  Side source{static_cast<char*>(const_cast<void*>(args.source)), {}};
  Side out{static_cast<char*>(args.out), {}};
  std::uintptr_t bits =
      address_bits(source.at) | address_bits(out.at) | static_cast<std::uintptr_t>(args.row_bytes);
  for (std::size_t i = 0; i < args.shape.size(); ++i) {
    source.stride[i] = args.source_stride[i];
    out.stride[i] = args.out_stride[i];
    bits |= static_cast<std::uintptr_t>(source.stride[i] | out.stride[i]);
  }
  with_word(bits, [&]<class Word>() {
    const auto [a, b, c] = args.shape;
    const std::int64_t words = args.row_bytes / static_cast<std::int64_t>(sizeof(Word));
    const auto [grid, block] = row_grid(a * b * c, words);
    launch(copy_kernel<Word>, grid, block, 0, args.on.stream, source, out, b, c, a * b * c, words);
  });
}

}  // namespace

const CopyKernels copy_kernels = {copy_cuda};

}  // namespace pympa::cuda
