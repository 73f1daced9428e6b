#include "core/dispatch.hpp"

#include "core/check.hpp"

namespace pympa {

namespace {

struct NamedIsa {
  const char* name;
  Isa isa;
};

#if defined(PYMPA_CUDA_KERNELS)
constexpr NamedIsa kIsas[] = {{"cuda", Isa::kCuda}};
#else
constexpr NamedIsa kIsas[] = {{"avx512_bf16", Isa::kAvx512Bf16},
                              {"avx512", Isa::kAvx512},
                              {"avx2", Isa::kAvx2},
                              {"portable", Isa::kPortable}};
#endif

bool runs_here(Isa isa) {
#if defined(PYMPA_CUDA_KERNELS)
  return isa == Isa::kCuda;
#elif defined(__x86_64__)
  // __builtin_cpu_supports also checks that the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx2:
      return avx2;
    case Isa::kPortable:
      return true;
    case Isa::kCuda:
      return false;
  }
  return false;
#else
  return isa == Isa::kPortable;
#endif
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const NamedIsa& entry : kIsas) {
    if (runs_here(entry.isa)) names.emplace_back(entry.name);
  }
  return names;
}

Isa parse_isa(const char* op, const std::string& name) {
  for (const NamedIsa& entry : kIsas) {
    if (name == entry.name && runs_here(entry.isa)) return entry.isa;
  }
  std::string supported;
  for (const std::string& one : supported_isas())
    supported += (supported.empty() ? "" : ", ") + one;
  fail(op, "isa", "one this machine supports (" + supported + ")", "'" + name + "'");
}

}  // namespace pympa
