// Copies of bytes in the widest words to which all addresses involved are aligned.
#pragma once

#include "cuda/rows.hpp"

namespace pympa::cuda {

// Calls run.template operator()<Word>(); `bits` is the bitwise or of all addresses, strides and
// lengths in bytes.
template <class Run>
void with_word(std::uintptr_t bits, Run&& run) {
  if (bits % sizeof(uint4) == 0) return run.template operator()<uint4>();
  if (bits % sizeof(std::uint32_t) == 0) return run.template operator()<std::uint32_t>();
  if (bits % sizeof(std::uint16_t) == 0) return run.template operator()<std::uint16_t>();
  run.template operator()<std::uint8_t>();
}

inline std::uintptr_t address_bits(const void* at) { return reinterpret_cast<std::uintptr_t>(at); }

}  // namespace pympa::cuda
