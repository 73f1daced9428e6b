// Host memory that kernels read and write directly, for small numbers between the host and a
// kernel, such as counts of experts.
#pragma once

#include <cstddef>

#include "cuda/runtime.hpp"

namespace pympa::cuda {

// Pinned and mapped, so no copy is launched and none waits for another stream. Each host thread has
// one of its own, since callers hold no common lock; what is in it lasts until the thread's next
// mailbox(). Reading what a kernel wrote takes a synchronised stream.
class Mailbox {
 public:
  static Mailbox& of_thread() {
    thread_local Mailbox mailbox;
    return mailbox;
  }

  // At least `count` elements, contents arbitrary, aligned for any type.
  template <class T>
  T* room(std::size_t count) {
    grow(count * sizeof(T));
    return static_cast<T*>(memory_);
  }

  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

 private:
  Mailbox() = default;
  // At the end of the process the driver may be gone, and the memory with it: no error counts.
  ~Mailbox() { static_cast<void>(cudaFreeHost(memory_)); }

  void grow(std::size_t bytes) {
    constexpr std::size_t kLeast = 4096;  // a page is pinned anyway
    if (bytes <= bytes_) return;
    PYMPA_CUDA_CHECK(cudaFreeHost(memory_));
    memory_ = nullptr;
    bytes_ = 0;
    const std::size_t wanted = bytes < kLeast ? kLeast : bytes;
    PYMPA_CUDA_CHECK(cudaHostAlloc(&memory_, wanted, cudaHostAllocMapped | cudaHostAllocPortable));
    bytes_ = wanted;
  }

  void* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

inline void synchronize(void* stream) {
  PYMPA_CUDA_CHECK(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}

}  // namespace pympa::cuda
