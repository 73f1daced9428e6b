#include "core/processor.hpp"

#if defined(__x86_64__)

#include <cpuid.h>

#include <cerrno>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pympa {

namespace {

// AMD's family 19h is Zen 3 and 4, of which only Zen 4 has the instruction; 1Ah is Zen 5. There it
// is one micro-operation. On Intel's cores from Sapphire Rapids on it is several: 82 to 89 GFLOP/s
// were measured on one of Emerald Rapids, 140 to 151 by widening.
bool has_fast_vdpbf16ps() {
  constexpr unsigned kFamilies[] = {0x19, 0x1a};
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return false;
  if (ebx != signature_AMD_ebx || ecx != signature_AMD_ecx || edx != signature_AMD_edx)
    return false;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
  for (unsigned known : kFamilies) {
    if (family == known) return true;
  }
  return false;
}

bool has_tiles() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  return (edx & kAmxBf16) && (edx & kAmxTile);
}

// Asks for the state of tiles; returns 0 or errno. ENOSPC: a thread has an alternate stack for
// signals that is too small for it.
int request_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}

Processor find_processor() {
  // __builtin_cpu_supports also checks that the operating system saves the wide registers.
  __builtin_cpu_init();
  Processor found{};
  found.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
  found.avx512 = found.avx2 && __builtin_cpu_supports("avx512f") &&
                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl");
  found.avx512_bf16 = found.avx512 && __builtin_cpu_supports("avx512bf16");
  if (found.avx512_bf16 && has_tiles()) {
    found.tiles_refused = request_tiles();
    found.amx_bf16 = found.tiles_refused == 0;
  }
  found.fast_vdpbf16ps = has_fast_vdpbf16ps();
  return found;
}

}  // namespace

const Processor& this_processor() {
  static const Processor found = find_processor();
  return found;
}

}  // namespace pympa

#endif
