// The base of every CUDA source of pympa: launching, shared memory, errors of the runtime.
//
// nvcc compiles the sources for GPUs. With PYMPA_CUDA_EMULATED any C++20 compiler compiles them for
// the CPU, where emulated/ interprets them thread by thread. That is slow, but it finds a wrong
// index, mask, tail or barrier without a GPU. Inline PTX is only in mma.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef PYMPA_CUDA_EMULATED
#include "cuda/emulated/interpreter.hpp"
#include "cuda/emulated/language.hpp"
#include "cuda/emulated/warp.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace pympa::cuda {

constexpr int kWarp = 32;

// A device function that keeps out of its caller's registers: for what hardly ever runs.
#ifdef PYMPA_CUDA_EMULATED
#define PYMPA_OUT_OF_LINE [[gnu::noinline]]
#else
#define PYMPA_OUT_OF_LINE __device__ __noinline__
#endif

#ifdef PYMPA_CUDA_EMULATED

inline unsigned char* dynamic_shared() { return emulated::dynamic_shared(); }

// One T for each block: every T has its own place, so a kernel names a struct of what it shares.
template <class T>
T& block_shared() {
  static T storage;
  static const bool known = emulated::poison_at_each_block(&storage, sizeof(T));
  static_cast<void>(known);
  return storage;
}

// Shared memory that one block may have.
inline int most_shared_bytes() { return emulated::most_shared_bytes; }

// Runs the grid before it returns; `stream` is not looked at.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
            void* /*stream*/, Args&&... args) {
  emulated::run_grid(grid, block, shared_bytes, [&] { kernel(static_cast<Params>(args)...); });
}

#else

// Throws std::runtime_error with the runtime's own words.
inline void check(cudaError_t status, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status) + " (" + file + ":" + std::to_string(line) +
                           ")");
}

#define PYMPA_CUDA_CHECK(call) ::pympa::cuda::check((call), __FILE__, __LINE__)

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char pympa_dynamic_shared[];
  return pympa_dynamic_shared;
}

// One T for each block: every T has its own place, so a kernel names a struct of what it shares.
template <class T>
__device__ __forceinline__ T& block_shared() {
  __shared__ T storage;
  return storage;
}

// Shared memory that one block may have on the current device.
inline int most_shared_bytes() {
  int device = 0, bytes = 0;
  PYMPA_CUDA_CHECK(cudaGetDevice(&device));
  PYMPA_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Held from the setting of a kernel's limit to its launch: the limit is the process's, and another
// host thread with a smaller launch would lower it in between.
inline std::mutex shared_limits;

// Launches on `stream` (a cudaStream_t). A grid with no block does nothing.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
            void* stream, Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr std::size_t kFreeBytes = 48 * 1024;  // more must be asked for, kernel by kernel
  std::unique_lock hold(shared_limits, std::defer_lock);
  if (shared_bytes > kFreeBytes) {
    hold.lock();
    PYMPA_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  PYMPA_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

#endif

}  // namespace pympa::cuda
