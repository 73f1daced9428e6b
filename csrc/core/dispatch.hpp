// Instruction-set dispatch. Every kernel file is compiled once for each ISA into its own namespace
// and exports one constant table of function pointers; an op picks the table of the Isa it is
// given. The Isa is always an argument: all ranks of a job agree on one, so that results agree bit
// for bit.
#pragma once

#include <string>
#include <vector>

#include "core/dtype.hpp"

namespace pympa {

// Names of the instruction sets this CPU runs, best first.
std::vector<std::string> supported_isas();

// Throws std::invalid_argument naming the supported ones if `name` is unknown or not supported.
Isa parse_isa(const char* op, const std::string& name);

#if defined(__x86_64__)

#define PYMPA_DECLARE_KERNELS(Table, name) \
  namespace avx512_bf16 {                  \
  extern const Table name;                 \
  }                                        \
  namespace avx512 {                       \
  extern const Table name;                 \
  }                                        \
  namespace avx2 {                         \
  extern const Table name;                 \
  }                                        \
  namespace portable {                     \
  extern const Table name;                 \
  }

#define PYMPA_SELECT_KERNELS(isa, name)                            \
  ((isa) == ::pympa::Isa::kAvx512Bf16 ? ::pympa::avx512_bf16::name \
   : (isa) == ::pympa::Isa::kAvx512   ? ::pympa::avx512::name      \
   : (isa) == ::pympa::Isa::kAvx2     ? ::pympa::avx2::name        \
                                      : ::pympa::portable::name)

#else

#define PYMPA_DECLARE_KERNELS(Table, name) \
  namespace portable {                     \
  extern const Table name;                 \
  }

#define PYMPA_SELECT_KERNELS(isa, name) (static_cast<void>(isa), ::pympa::portable::name)

#endif

}  // namespace pympa
