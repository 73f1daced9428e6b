// The functions, types and values of cuBLASLt that gemm uses. They are declared here so that
// neither building nor importing pympa needs the library; cublaslt_check.cpp compares them with its
// header. The library makes descriptors, because their sizes differ between versions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pympa::cuda::cublaslt {

using Status = int;  // 0 is success
constexpr Status kNotSupported = 15;
using Handle = void*;
using Operation = void*;   // cublasLtMatmulDesc_t
using Layout = void*;      // cublasLtMatrixLayout_t
using Preference = void*;  // cublasLtMatmulPreference_t
using Stream = void*;      // cudaStream_t

enum DataType : int { kFloat32 = 0, kFloat16 = 2, kBFloat16 = 14 };
enum ComputeType : int { kComputeFloat32 = 68 };  // no TF32, and float32 sums of 16-bit products
enum Transpose : std::int32_t { kTransposed = 1 };
enum Epilogue : std::uint32_t { kPlain = 1, kBias = 4, kGelu = 32, kGeluBias = 36 };
enum ReductionScheme : std::uint32_t { kNoReduction = 0 };

enum OperationAttribute : int { kTransposeA = 3, kEpilogue = 7, kBiasPointer = 8 };
enum PreferenceAttribute : int {
  kMaxWorkspaceBytes = 1,
  kReductionSchemes = 3,
  kAlignmentA = 5,
  kAlignmentB = 6,
  kAlignmentC = 7,
  kAlignmentD = 8,
};
enum AlgorithmAttribute : int { kSplitK = 2, kReductionScheme = 3 };

struct Algorithm {
  std::uint64_t data[8];
};

struct Heuristic {
  Algorithm algorithm;
  std::size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

struct Library {
  Status (*create)(Handle*);
  const char* (*status_name)(Status);
  std::size_t (*version)();
  Status (*operation_create)(Operation*, ComputeType, DataType);
  Status (*operation_destroy)(Operation);
  Status (*operation_set)(Operation, OperationAttribute, const void*, std::size_t);
  Status (*layout_create)(Layout*, DataType, std::uint64_t rows, std::uint64_t columns,
                          std::int64_t stride);
  Status (*layout_destroy)(Layout);
  Status (*preference_create)(Preference*);
  Status (*preference_destroy)(Preference);
  Status (*preference_set)(Preference, PreferenceAttribute, const void*, std::size_t);
  Status (*heuristic)(Handle, Operation, Layout a, Layout b, Layout c, Layout d, Preference,
                      int requested, Heuristic*, int* found);
  Status (*algorithm_check)(Handle, Operation, Layout a, Layout b, Layout c, Layout d,
                            const Algorithm*, Heuristic*);
  Status (*algorithm_get)(const Algorithm*, AlgorithmAttribute, void*, std::size_t, std::size_t*);
  Status (*multiply)(Handle, Operation, const void* alpha, const void* a, Layout, const void* b,
                     Layout, const void* beta, const void* c, Layout, void* d, Layout,
                     const Algorithm*, void* workspace, std::size_t workspace_bytes, Stream);
};

// The library, loaded at the first call: what the process has loaded already, what the system's
// loader finds, or what lies in `directory`. Throws std::runtime_error if there is none.
const Library& library(const std::string& directory = {});

}  // namespace pympa::cuda::cublaslt
