// Products by cuBLASLt, which uses column-major matrices: out^T [n, m] = weight [n, k] x^T [k, m].
//
// An algorithm is chosen from the sizes that all rows share, at a nominal number of rows, and is
// then used for any number of rows, because a row's bits depend on its tile, stages and order of k.
// It must not split k: no reduction scheme, no split, and no workspace in which blocks could
// combine results.

#include <algorithm>
#include <compare>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>

#include "cuda/cublaslt.hpp"
#include "cuda/gemm.hpp"
#include "cuda/runtime.hpp"

namespace pympa::cuda {

namespace {

namespace lt = cublaslt;

constexpr std::int64_t kNominalRows = 4096;  // a prefill's; few rows take the same tiles
constexpr std::int64_t kOtherRows[] = {1, kNominalRows - 1};  // that an algorithm must serve, too
constexpr int kCandidates = 32;
constexpr std::uint32_t kAligned = 16;  // bytes; of pointers and of rows

lt::DataType data_type(DType dtype) {
  return dtype == DType::kFloat32   ? lt::kFloat32
         : dtype == DType::kFloat16 ? lt::kFloat16
                                    : lt::kBFloat16;
}

std::uint32_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void check(lt::Status status, const char* call) {
  if (status == 0) return;
  throw std::runtime_error(std::string("cuBLASLt: ") + call + ": " +
                           lt::library().status_name(status));
}

// Bytes that addresses and rows are multiples of: 16, or what holds for any element.
std::uint32_t alignment(const void* at, std::int64_t stride, DType dtype) {
  const auto bits =
      reinterpret_cast<std::uintptr_t>(at) | static_cast<std::uintptr_t>(stride) * size_of(dtype);
  return bits % kAligned == 0 ? kAligned : size_of(dtype);
}

// What an algorithm is chosen for. Rows taken from an array have its alignment, however many, if
// its rows are multiples of 16 bytes apart; where they are not, all its parts count as unaligned.
struct Problem {
  int device;
  std::int64_t n, k;
  DType dtype, out_dtype;
  bool bias, gelu;
  std::uint32_t x_alignment;

  auto operator<=>(const Problem&) const = default;

  lt::Epilogue epilogue() const {
    if (gelu) return bias ? lt::kGeluBias : lt::kGelu;
    return bias ? lt::kBias : lt::kPlain;
  }
};

// A descriptor of the library's, destroyed with this.
using Owned = std::unique_ptr<void, lt::Status (*)(void*)>;

Owned new_layout(DType dtype, std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  const lt::Library& library = lt::library();
  lt::Layout layout = nullptr;
  check(library.layout_create(&layout, data_type(dtype), static_cast<std::uint64_t>(rows),
                              static_cast<std::uint64_t>(columns), stride),
        "MatrixLayoutCreate");
  return {layout, library.layout_destroy};
}

template <class Value>
void set(const Owned& operation, lt::OperationAttribute attribute, Value value) {
  check(lt::library().operation_set(operation.get(), attribute, &value, sizeof(value)),
        "MatmulDescSetAttribute");
}

template <class Value>
void set(const Owned& preference, lt::PreferenceAttribute attribute, Value value) {
  check(lt::library().preference_set(preference.get(), attribute, &value, sizeof(value)),
        "MatmulPreferenceSetAttribute");
}

Owned new_operation(const Problem& problem, const void* bias) {
  const lt::Library& library = lt::library();
  lt::Operation created = nullptr;
  check(library.operation_create(&created, lt::kComputeFloat32, lt::kFloat32), "MatmulDescCreate");
  Owned operation{created, library.operation_destroy};
  set(operation, lt::kTransposeA, lt::kTransposed);
  set(operation, lt::kEpilogue, problem.epilogue());
  if (bias) set(operation, lt::kBiasPointer, bias);
  return operation;
}

// `alignment` is that of the weight, the bias and the result.
Owned new_preference(const Problem& problem, std::uint32_t alignment) {
  const lt::Library& library = lt::library();
  lt::Preference created = nullptr;
  check(library.preference_create(&created), "MatmulPreferenceCreate");
  Owned preference{created, library.preference_destroy};
  set(preference, lt::kMaxWorkspaceBytes, std::uint64_t{0});
  set(preference, lt::kReductionSchemes, lt::kNoReduction);
  set(preference, lt::kAlignmentA, alignment);
  set(preference, lt::kAlignmentB, problem.x_alignment);
  set(preference, lt::kAlignmentC, alignment);
  set(preference, lt::kAlignmentD, alignment);
  return preference;
}

template <class Value>
Value property(const lt::Algorithm& algorithm, lt::AlgorithmAttribute attribute) {
  Value value{};
  check(lt::library().algorithm_get(&algorithm, attribute, &value, sizeof(value), nullptr),
        "MatmulAlgoConfigGetAttribute");
  return value;
}

bool splits_k(const lt::Algorithm& algorithm) {
  return property<std::int32_t>(algorithm, lt::kSplitK) > 1 ||
         property<std::uint32_t>(algorithm, lt::kReductionScheme) != lt::kNoReduction;
}

// A row stride of a matrix with that alignment.
std::int64_t nominal_stride(std::int64_t columns, std::uint32_t alignment, DType dtype) {
  const std::int64_t group = kAligned / size_of(dtype);
  return (columns + group - 1) / group * group + (alignment == kAligned ? 0 : 1);
}

// Arrays of a problem with some rows of x.
struct Layouts {
  Owned weight, x, out;

  Layouts(const Problem& problem, std::int64_t rows)
      : weight(new_layout(problem.dtype, problem.k, problem.n,
                          nominal_stride(problem.k, kAligned, problem.dtype))),
        x(new_layout(problem.dtype, problem.k, rows,
                     nominal_stride(problem.k, problem.x_alignment, problem.dtype))),
        out(new_layout(problem.out_dtype, problem.n, rows,
                       nominal_stride(problem.n, kAligned, problem.out_dtype))) {}
};

bool serves(lt::Handle handle, const Owned& operation, const Layouts& layouts,
            const lt::Algorithm& algorithm) {
  lt::Heuristic result{};
  const lt::Status status =
      lt::library().algorithm_check(handle, operation.get(), layouts.weight.get(), layouts.x.get(),
                                    layouts.out.get(), layouts.out.get(), &algorithm, &result);
  return status == 0 && result.workspace_bytes == 0;
}

// The first algorithm that keeps k whole, takes no workspace and serves any number of rows, if the
// library offers one for this alignment.
std::optional<lt::Algorithm> find(lt::Handle handle, const Problem& problem,
                                  std::uint32_t alignment) {
  // Only the alignment of a bias counts here, and other layers' are no better aligned than this.
  const void* bias =
      problem.bias ? reinterpret_cast<const void*>(std::uintptr_t{alignment}) : nullptr;
  const Owned operation = new_operation(problem, bias);
  const Layouts nominal(problem, kNominalRows);
  const Owned preference = new_preference(problem, alignment);
  lt::Heuristic candidates[kCandidates];
  int found = 0;
  const lt::Status status = lt::library().heuristic(
      handle, operation.get(), nominal.weight.get(), nominal.x.get(), nominal.out.get(),
      nominal.out.get(), preference.get(), kCandidates, candidates, &found);
  if (status == lt::kNotSupported) return {};
  check(status, "MatmulAlgoGetHeuristic");
  for (const lt::Heuristic& candidate : std::span(candidates, static_cast<std::size_t>(found))) {
    const lt::Algorithm& algorithm = candidate.algorithm;
    if (candidate.state == 0 && candidate.workspace_bytes == 0 && !splits_k(algorithm) &&
        std::ranges::all_of(kOtherRows, [&](std::int64_t rows) {
          return serves(handle, operation, Layouts(problem, rows), algorithm);
        })) {
      return algorithm;
    }
  }
  return {};
}

// Where x is not aligned, the library may have no algorithm for arrays of both kinds. It is then
// asked for one that takes the others, too, to be no better aligned, which does them no harm.
lt::Algorithm choose(lt::Handle handle, const Problem& problem) {
  for (const std::uint32_t alignment : {kAligned, problem.x_alignment}) {
    if (const auto found = find(handle, problem, alignment)) return *found;
  }
  throw std::runtime_error("cuBLASLt: no algorithm keeps k whole, without a workspace, for 1 and " +
                           std::to_string(kNominalRows) + " rows of n " +
                           std::to_string(problem.n) + ", k " + std::to_string(problem.k) +
                           ", x aligned to " + std::to_string(problem.x_alignment) + " bytes");
}

// Handles and algorithms by what they are made for. Each is a function of its key, so it does not
// matter who asks first; they live as long as the process, which may end after the driver does.
class Memory {
 public:
  static Memory& of_process() {
    static Memory& memory = *new Memory;
    return memory;
  }

  std::pair<lt::Handle, lt::Algorithm> recall(const Problem& problem) {
    const std::lock_guard hold(guard_);
    lt::Handle& handle = handles_[problem.device];
    if (!handle) check(lt::library().create(&handle), "Create");
    const auto known = algorithms_.find(problem);
    if (known != algorithms_.end()) return {handle, known->second};
    return {handle, algorithms_[problem] = choose(handle, problem)};
  }

 private:
  std::mutex guard_;
  std::map<int, lt::Handle> handles_;
  std::map<Problem, lt::Algorithm> algorithms_;
};

}  // namespace

void gemm(const GemmArgs& args) {
  Problem problem{0,
                  args.n,
                  args.k,
                  args.dtype,
                  args.out_dtype,
                  args.bias != nullptr,
                  args.gelu,
                  alignment(args.x, args.x_stride, args.dtype)};
  PYMPA_CUDA_CHECK(cudaGetDevice(&problem.device));
  const auto [handle, algorithm] = Memory::of_process().recall(problem);
  const Owned operation = new_operation(problem, args.bias);
  const Owned weight = new_layout(args.dtype, args.k, args.n, args.weight_stride);
  const Owned x = new_layout(args.dtype, args.k, args.m, args.x_stride);
  const Owned out = new_layout(args.out_dtype, args.n, args.m, args.out_stride);
  const float one = 1.0F, zero = 0.0F;
  check(lt::library().multiply(handle, operation.get(), &one, args.weight, weight.get(), args.x,
                               x.get(), &zero, args.out, out.get(), args.out, out.get(), &algorithm,
                               nullptr, 0, args.stream),
        "Matmul");
}

std::int64_t load_gemm(const std::string& directory) {
  return static_cast<std::int64_t>(lt::library(directory).version());
}

}  // namespace pympa::cuda
