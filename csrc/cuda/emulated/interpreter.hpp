// Runs a grid on one CPU thread. Every CUDA thread is a fiber, every block starts with poisoned
// shared memory, and warps and blocks synchronise by CUDA's rules.
//
// A warp runs as far as it can before another one runs, from first to last in even blocks and from
// last to first in odd ones, so a missing barrier shows as poison or stale values. Code that would
// hang or break a rule on a GPU ends the launch with std::runtime_error. Speed, memory order
// between warps that do synchronise, and the last bits of exp2f and similar functions are not
// emulated.
#pragma once

#include <cstddef>
#include <functional>

// NOLINTBEGIN: CUDA's names.
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};
// NOLINTEND

namespace pympa::cuda::emulated {

inline int most_shared_bytes = 227 * 1024;  // as on an H100; an A100 has 163 KB

// Calls `thread` once for each thread. Launches of several callers take turns.
void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& thread);

unsigned char* dynamic_shared();
bool poison_at_each_block(void* storage, std::size_t bytes);

// Ends the launch with a message that names the thread.
[[noreturn]] void fail(const char* what);

// `address` must lie in the block's shared memory, `bytes` of it, aligned to `bytes`.
void check_shared(const char* instruction, const void* address, std::size_t bytes);

// Returns when `threads` threads of the block came to barrier `id`, and whether any had a `vote`; 0
// and all is __syncthreads.
bool barrier(int id, int threads, bool vote = false);

int lane();

// An instruction of the whole warp: when all 32 lanes came, `act` gets what each brought.
void meet(const char* instruction, void* brought, void (*act)(void* const* lanes));

template <class Brought, auto kAct>
void meet(const char* instruction, Brought& brought) {
  meet(instruction, static_cast<void*>(&brought),
       [](void* const* lanes) { kAct(reinterpret_cast<Brought* const*>(lanes)); });
}

// cp.async: from its issue on the 16 bytes at `to` are poison; they are `bytes` bytes of `from` and
// zeros once this thread has waited for their group.
void copy_async(void* to, const void* from, int bytes);
void commit_copies();
void wait_for_copies(int groups_left);

}  // namespace pympa::cuda::emulated
