// Instructions of a warp and of a block under CUDA's names. Kernels pass all 32 lanes in every
// mask.
#pragma once

#include "cuda/emulated/interpreter.hpp"

namespace pympa::cuda::emulated {

template <class T>
struct Shuffle {
  T value;
  int source;  // negative: the lane keeps its own
  T result;
};

template <class T>
void exchange(Shuffle<T>* const* lanes) {
  for (int i = 0; i < 32; ++i) {
    const int from = lanes[i]->source;
    lanes[i]->result = lanes[from < 0 ? i : from]->value;
  }
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  if (mask != 0xffffffffU) fail("a mask that leaves out lanes");
  Shuffle<T> mine{value, source, value};
  meet<Shuffle<T>, exchange<T>>(name, mine);
  return mine.result;
}

struct Vote {
  bool predicate;
  unsigned result;
};

inline void count(Vote* const* lanes) {
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(lanes[i]->predicate) << i;
  for (int i = 0; i < 32; ++i) lanes[i]->result = votes;
}

}  // namespace pympa::cuda::emulated

// NOLINTBEGIN: CUDA's names.
inline int __syncthreads_or(int predicate) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  return ::pympa::cuda::emulated::barrier(0, static_cast<int>(threads), predicate != 0);
}
inline void __syncthreads() { __syncthreads_or(0); }

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  if (mask != 0xffffffffU) ::pympa::cuda::emulated::fail("a mask that leaves out lanes");
  ::pympa::cuda::emulated::Vote mine{predicate, 0};
  ::pympa::cuda::emulated::meet<::pympa::cuda::emulated::Vote, ::pympa::cuda::emulated::count>(
      "a vote or __syncwarp", mine);
  return mine.result;
}

inline void __syncwarp(unsigned mask = 0xffffffffU) { __ballot_sync(mask, false); }
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate); }
inline bool __all_sync(unsigned mask, bool predicate) { return !__ballot_sync(mask, !predicate); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = ::pympa::cuda::emulated::lane();
  const int from = lane / width * width + source % width;
  return ::pympa::cuda::emulated::shuffle("__shfl_sync", mask, value, from);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = ::pympa::cuda::emulated::lane(), from = lane ^ bits;
  const bool inside = from / width == lane / width;
  return ::pympa::cuda::emulated::shuffle("__shfl_xor_sync", mask, value, inside ? from : -1);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = ::pympa::cuda::emulated::lane(), from = lane + delta;
  const bool inside = lane % width + delta < width;
  return ::pympa::cuda::emulated::shuffle("__shfl_down_sync", mask, value, inside ? from : -1);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = ::pympa::cuda::emulated::lane(), from = lane - delta;
  const bool inside = lane % width >= delta;
  return ::pympa::cuda::emulated::shuffle("__shfl_up_sync", mask, value, inside ? from : -1);
}

// Threads run one at a time here, so that plain arithmetic is atomic.
template <class T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = value < old ? value : old;
  return old;
}
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
// NOLINTEND
