// Element types and instruction-set names: plain enums, shared by checks, bindings and kernels.
// Nothing here has code, so a kernel file compiled for one ISA can include it safely.
#pragma once

namespace pympa {

enum class DType { kFloat32, kFloat16, kBFloat16, kInt32, kInt64, kUInt8 };

enum class Isa { kAvx512Bf16, kAvx512, kAvx2, kPortable, kCuda };

}  // namespace pympa
