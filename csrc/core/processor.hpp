// What this processor has, for the choice of an instruction set.
#pragma once

namespace pympa {

struct Processor {
  bool avx2, avx512, avx512_bf16, amx_bf16;
  // By a table of processors alone: a measurement could choose otherwise the next time, and bits
  // would vary from run to run. An unknown one counts as slow.
  bool fast_vdpbf16ps;
  int tiles_refused;  // errno of the kernel's answer; 0 where it was not asked, or agreed
};

// Finds out once in a process. That includes asking the kernel for permission to use matrix tiles;
// where it refuses, there are none.
const Processor& this_processor();

}  // namespace pympa
