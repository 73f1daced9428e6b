// Dispatch to instruction sets and devices. Every CPU kernel file is compiled once for each ISA,
// into its own namespace, and exports one constant table of function pointers; an op uses the table
// of the Isa that it is given. The Isa is always an argument: all ranks of a job agree on one, so
// that results have the same bits. Code that would be the same for two ISAs exists once. With
// PYMPA_CUDA_KERNELS the same ops form a separate module whose only tables are those of the CUDA
// kernels.
#pragma once

#include <string>
#include <vector>

#include "core/dtype.hpp"

namespace pympa {

// What a call of an op runs on.
struct Execution {
  Isa isa = Isa::kPortable;
  int threads = 1;         // of a CPU
  void* stream = nullptr;  // cudaStream_t of a GPU
};

// Names of the instruction sets that this machine runs, best first.
std::vector<std::string> supported_isas();

// Why this processor's matrix tiles are not among them; empty if it has none, or they are.
std::string why_no_tiles();

// Throws std::invalid_argument naming the supported ones if `name` is unknown or not supported.
Isa parse_isa(const char* op, const std::string& name);

// Whose kernels multiply elements of `dtype`. All that avx512_bf16 adds to avx512 are products of
// bfloat16, so for other dtypes the two have the same kernels, and one compilation of them.
constexpr Isa isa_for(DType dtype, Isa isa) {
  return isa == Isa::kAvx512Bf16 && dtype != DType::kBFloat16 ? Isa::kAvx512 : isa;
}

#if defined(PYMPA_CUDA_KERNELS)

// Kernels run later and in another memory: an op checks shapes and host arrays, not the values of
// device arrays.
constexpr bool kReadsKernelArrays = false;

#define PYMPA_DECLARE_KERNELS(Table, name) \
  namespace cuda {                         \
  extern const Table name;                 \
  }

#define PYMPA_DECLARE_FLOAT_KERNELS PYMPA_DECLARE_KERNELS

#define PYMPA_SELECT_KERNELS(isa, name) (static_cast<void>(isa), ::pympa::cuda::name)

#elif defined(__x86_64__)

constexpr bool kReadsKernelArrays = true;

#define PYMPA_DECLARE_KERNEL_OF(isa, Table, name) \
  namespace isa {                                 \
  extern const Table name;                        \
  }

#define PYMPA_SHARE_KERNEL(isa, name) \
  namespace isa {                     \
  using avx512::name;                 \
  }

#define PYMPA_DECLARE_KERNELS(Table, name)          \
  PYMPA_DECLARE_KERNEL_OF(amx_bf16, Table, name)    \
  PYMPA_DECLARE_KERNEL_OF(avx512_bf16, Table, name) \
  PYMPA_DECLARE_KERNEL_OF(avx512, Table, name)      \
  PYMPA_DECLARE_KERNEL_OF(avx2, Table, name)        \
  PYMPA_DECLARE_KERNEL_OF(portable, Table, name)    \
  PYMPA_DECLARE_KERNEL_OF(amx_emulated, Table, name)

// Kernels that compute in float32 alone: those of avx512 are avx512_bf16's and amx_bf16's as well.
#define PYMPA_DECLARE_FLOAT_KERNELS(Table, name) \
  PYMPA_DECLARE_KERNEL_OF(avx512, Table, name)   \
  PYMPA_SHARE_KERNEL(avx512_bf16, name)          \
  PYMPA_SHARE_KERNEL(amx_bf16, name)             \
  PYMPA_DECLARE_KERNEL_OF(avx2, Table, name)     \
  PYMPA_DECLARE_KERNEL_OF(portable, Table, name) \
  PYMPA_DECLARE_KERNEL_OF(amx_emulated, Table, name)

#define PYMPA_SELECT_KERNELS(isa, name)                                \
  ((isa) == ::pympa::Isa::kAmxBf16       ? ::pympa::amx_bf16::name     \
   : (isa) == ::pympa::Isa::kAvx512Bf16  ? ::pympa::avx512_bf16::name  \
   : (isa) == ::pympa::Isa::kAvx512      ? ::pympa::avx512::name       \
   : (isa) == ::pympa::Isa::kAvx2        ? ::pympa::avx2::name         \
   : (isa) == ::pympa::Isa::kAmxEmulated ? ::pympa::amx_emulated::name \
                                         : ::pympa::portable::name)

#else

constexpr bool kReadsKernelArrays = true;

#define PYMPA_DECLARE_KERNELS(Table, name) \
  namespace portable {                     \
  extern const Table name;                 \
  }

#define PYMPA_DECLARE_FLOAT_KERNELS PYMPA_DECLARE_KERNELS

#define PYMPA_SELECT_KERNELS(isa, name) (static_cast<void>(isa), ::pympa::portable::name)

#endif

}  // namespace pympa
