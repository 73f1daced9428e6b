#include "core/dispatch.hpp"

#include <cstring>

#include "core/check.hpp"
#if defined(__x86_64__) && !defined(PYMPA_CUDA_KERNELS)
#include "core/processor.hpp"
#endif

namespace pympa {

namespace {

struct NamedIsa {
  const char* name;
  Isa isa;
};

constexpr NamedIsa kNames[] = {
    {"amx_bf16", Isa::kAmxBf16}, {"avx512_bf16", Isa::kAvx512Bf16},   {"avx512", Isa::kAvx512},
    {"avx2", Isa::kAvx2},        {"amx_emulated", Isa::kAmxEmulated}, {"portable", Isa::kPortable},
    {"cuda", Isa::kCuda}};

// Those that run here, best first.
std::vector<Isa> find_isas() {
#if defined(PYMPA_CUDA_KERNELS)
  return {Isa::kCuda};
#elif defined(__x86_64__)
  std::vector<Isa> found;
  const Processor& processor = this_processor();
  if (processor.amx_bf16) found.push_back(Isa::kAmxBf16);
  // Where it takes several micro-operations, bfloat16 widened to float32 is faster.
  if (processor.avx512_bf16 && processor.fast_vdpbf16ps) found.push_back(Isa::kAvx512Bf16);
  if (processor.avx512) found.push_back(Isa::kAvx512);
  if (processor.avx512_bf16 && !processor.fast_vdpbf16ps) found.push_back(Isa::kAvx512Bf16);
  if (processor.avx2) found.push_back(Isa::kAvx2);
  found.push_back(Isa::kPortable);
  if (processor.avx2) found.push_back(Isa::kAmxEmulated);
  return found;
#else
  return {Isa::kPortable};
#endif
}

const std::vector<Isa>& isas_here() {
  static const std::vector<Isa> found = find_isas();
  return found;
}

const char* name_of(Isa isa) {
  for (const NamedIsa& entry : kNames) {
    if (entry.isa == isa) return entry.name;
  }
  return "unknown";
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : isas_here()) names.emplace_back(name_of(isa));
  return names;
}

std::string why_no_tiles() {
#if defined(__x86_64__) && !defined(PYMPA_CUDA_KERNELS)
  const int refused = this_processor().tiles_refused;
  if (refused != 0) return std::string("the kernel refuses them: ") + std::strerror(refused);
#endif
  return {};
}

Isa parse_isa(const char* op, const std::string& name) {
  for (Isa isa : isas_here()) {
    if (name == name_of(isa)) return isa;
  }
  std::string supported;
  for (const std::string& one : supported_isas())
    supported += (supported.empty() ? "" : ", ") + one;
  fail(op, "isa", "one this machine supports (" + supported + ")", "'" + name + "'");
}

}  // namespace pympa
