// Compares cublaslt.hpp with the header of an installed cuBLASLt. It is compiled if the header
// exists, and generates no code.

#include <cublasLt.h>

#include <type_traits>

#include "cuda/cublaslt.hpp"

namespace pympa::cuda::cublaslt {

namespace {

// Whether an argument or result is passed alike: both pointers, or numbers of one size and kind.
template <class Theirs, class Ours>
constexpr bool is_alike =
    (std::is_pointer_v<Theirs> && std::is_pointer_v<Ours>) ||
    (!std::is_pointer_v<Theirs> && !std::is_pointer_v<Ours> && sizeof(Theirs) == sizeof(Ours) &&
     std::is_floating_point_v<Theirs> == std::is_floating_point_v<Ours>);

template <class... Theirs, class... Ours, class Result, class OurResult>
constexpr bool are_alike(Result (*)(Theirs...), OurResult (*)(Ours...)) {
  if constexpr (sizeof...(Theirs) != sizeof...(Ours)) {
    return false;
  } else {
    return is_alike<Result, OurResult> && (is_alike<Theirs, Ours> && ...);
  }
}

constexpr bool is_same(auto theirs, auto ours) {
  return static_cast<std::int64_t>(theirs) == static_cast<std::int64_t>(ours);
}

constexpr Library kOurs{};

static_assert(are_alike(&::cublasLtCreate, kOurs.create));
static_assert(are_alike(&::cublasLtGetStatusName, kOurs.status_name));
static_assert(are_alike(&::cublasLtGetVersion, kOurs.version));
static_assert(are_alike(&::cublasLtMatmulDescCreate, kOurs.operation_create));
static_assert(are_alike(&::cublasLtMatmulDescDestroy, kOurs.operation_destroy));
static_assert(are_alike(&::cublasLtMatmulDescSetAttribute, kOurs.operation_set));
static_assert(are_alike(&::cublasLtMatrixLayoutCreate, kOurs.layout_create));
static_assert(are_alike(&::cublasLtMatrixLayoutDestroy, kOurs.layout_destroy));
static_assert(are_alike(&::cublasLtMatmulPreferenceCreate, kOurs.preference_create));
static_assert(are_alike(&::cublasLtMatmulPreferenceDestroy, kOurs.preference_destroy));
static_assert(are_alike(&::cublasLtMatmulPreferenceSetAttribute, kOurs.preference_set));
static_assert(are_alike(&::cublasLtMatmulAlgoGetHeuristic, kOurs.heuristic));
static_assert(are_alike(&::cublasLtMatmulAlgoCheck, kOurs.algorithm_check));
static_assert(are_alike(&::cublasLtMatmulAlgoConfigGetAttribute, kOurs.algorithm_get));
static_assert(are_alike(&::cublasLtMatmul, kOurs.multiply));

static_assert(is_same(CUBLAS_STATUS_SUCCESS, 0));
static_assert(is_same(CUBLAS_STATUS_NOT_SUPPORTED, kNotSupported));
static_assert(is_same(CUDA_R_32F, kFloat32));
static_assert(is_same(CUDA_R_16F, kFloat16));
static_assert(is_same(CUDA_R_16BF, kBFloat16));
static_assert(is_same(CUBLAS_COMPUTE_32F, kComputeFloat32));
static_assert(is_same(CUBLAS_OP_T, kTransposed));
static_assert(is_same(CUBLASLT_EPILOGUE_DEFAULT, kPlain));
static_assert(is_same(CUBLASLT_EPILOGUE_BIAS, kBias));
static_assert(is_same(CUBLASLT_EPILOGUE_GELU, kGelu));
static_assert(is_same(CUBLASLT_EPILOGUE_GELU_BIAS, kGeluBias));
static_assert(is_same(CUBLASLT_REDUCTION_SCHEME_NONE, kNoReduction));
static_assert(is_same(CUBLASLT_MATMUL_DESC_TRANSA, kTransposeA));
static_assert(is_same(CUBLASLT_MATMUL_DESC_EPILOGUE, kEpilogue));
static_assert(is_same(CUBLASLT_MATMUL_DESC_BIAS_POINTER, kBiasPointer));
static_assert(is_same(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kMaxWorkspaceBytes));
static_assert(is_same(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, kReductionSchemes));
static_assert(is_same(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, kAlignmentA));
static_assert(is_same(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, kAlignmentB));
static_assert(is_same(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, kAlignmentC));
static_assert(is_same(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, kAlignmentD));
static_assert(is_same(CUBLASLT_ALGO_CONFIG_SPLITK_NUM, kSplitK));
static_assert(is_same(CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, kReductionScheme));

static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(Algorithm));
using Theirs = cublasLtMatmulHeuristicResult_t;
static_assert(sizeof(Theirs) == sizeof(Heuristic));
static_assert(offsetof(Theirs, algo) == offsetof(Heuristic, algorithm));
static_assert(offsetof(Theirs, workspaceSize) == offsetof(Heuristic, workspace_bytes));
static_assert(offsetof(Theirs, state) == offsetof(Heuristic, state));
static_assert(offsetof(Theirs, wavesCount) == offsetof(Heuristic, waves));

}  // namespace

}  // namespace pympa::cuda::cublaslt
