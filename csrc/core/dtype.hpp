// Element types and names of instruction sets: plain enums for checks, bindings and kernels. There
// is no code here, so a kernel file that is compiled for one ISA can include it safely.
#pragma once

namespace pympa {

enum class DType { kFloat32, kFloat16, kBFloat16, kInt32, kInt64, kUInt8 };

enum class Isa { kAmxBf16, kAvx512Bf16, kAvx512, kAvx2, kPortable, kAmxEmulated, kCuda };

}  // namespace pympa
