// The checked longjmp refuses to switch between stacks, which is its purpose here.
#undef _FORTIFY_SOURCE

#include "cuda/emulated/interpreter.hpp"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace pympa::cuda::emulated {

namespace {

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr std::size_t kGuardBytes = 64 * 1024;  // at least a page, whatever the machine's pages
constexpr int kPoison = 0xff;                   // a NaN in every float format
constexpr unsigned char kCanary = 0xa5;
constexpr std::size_t kCanaryBytes = 256;
constexpr int kLanes = 32;
constexpr int kBarriers = 16;

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
  jmp_buf context;
  uint3 index{};
  int warp = 0, lane = 0;
  const char* waits_at = nullptr;
  std::vector<Copy> copies;
  int group = 0;
  bool vote = false;  // of all that met at the last barrier
};

struct Warp {
  unsigned ready = 0, arrived = 0;
  const char* instruction = nullptr;
  void* brought[kLanes] = {};
};

struct Barrier {
  int threads = 0;
  bool vote = false;
  std::vector<Fiber*> arrived;
};

// Stacks of fibers, kept from launch to launch; a guard lies below each.
class Stacks {
 public:
  void* at(std::size_t index) {
    while (stacks_.size() <= index) {
      void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      mprotect(memory, kGuardBytes, PROT_NONE);
      stacks_.push_back(static_cast<char*>(memory) + kGuardBytes);
    }
    return stacks_[index];
  }

 private:
  std::vector<void*> stacks_;
};

struct Static {
  void* storage;
  std::size_t bytes;
};

std::mutex one_launch;
Stacks stacks;
std::vector<Static>& statics() {
  static std::vector<Static> all;
  return all;
}

// The launch under way.
const std::function<void()>* body;
std::deque<Fiber> fibers;
std::vector<Warp> warps;
Barrier barriers[kBarriers];
std::vector<unsigned char> shared;
std::size_t shared_size;
Fiber* current;
jmp_buf scheduler;
ucontext_t starter;
std::string error;
int running;    // threads of the block that have not ended
int direction;  // of turns among warps and lanes

std::string text(uint3 at) {
  std::string text(1, '(');
  text += std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z);
  return text += ')';
}

std::string name_of(const Fiber& fiber) {
  return "thread " + text(fiber.index) + " of block " + text(blockIdx);
}

[[gnu::noinline]] void jump(jmp_buf& from, jmp_buf& to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

Fiber* next_ready() {
  const int count = static_cast<int>(warps.size());
  for (int step = 0; step < count; ++step) {
    const int warp = ((current         ? current->warp
                       : direction > 0 ? 0
                                       : count - 1) +
                      direction * step + count) %
                     count;
    const unsigned ready = warps[static_cast<std::size_t>(warp)].ready;
    if (ready == 0) continue;
    const int lane = direction > 0 ? __builtin_ctz(ready) : kLanes - 1 - __builtin_clz(ready);
    return &fibers[static_cast<std::size_t>(warp * kLanes + lane)];
  }
  return nullptr;
}

// Gives the turn to another fiber, or to the scheduler where none can go on.
void yield(jmp_buf& from) {
  Fiber* next = next_ready();
  current = next;
  if (next) threadIdx = next->index;
  jump(from, next ? next->context : scheduler);
}

unsigned bit(const Fiber& fiber) { return 1U << fiber.lane; }
Warp& warp_of(const Fiber& fiber) { return warps[static_cast<std::size_t>(fiber.warp)]; }

void wait_at(const char* what) {
  Fiber& self = *current;
  self.waits_at = what;
  warp_of(self).ready &= ~bit(self);
  yield(self.context);
  self.waits_at = nullptr;
}

void fiber_main() {
  Fiber& self = *current;
  if (_setjmp(self.context) == 0) setcontext(&starter);
  while (true) {
    try {
      (*body)();
    } catch (const std::exception& caught) {
      error = caught.what();
      jump(self.context, scheduler);
    }
    --running;
    warp_of(self).ready &= ~bit(self);
    yield(self.context);
  }
}

void make_fibers(dim3 block) {
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  fibers.clear();
  fibers.resize(threads);
  warps.assign(threads / kLanes, Warp{});
  for (std::size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    const auto flat = static_cast<unsigned>(i);
    fiber.index = {flat % block.x, flat / block.x % block.y, flat / block.x / block.y};
    fiber.warp = static_cast<int>(flat / kLanes);
    fiber.lane = static_cast<int>(flat % kLanes);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack = {stacks.at(i), 0, kStackBytes};
    makecontext(&context, fiber_main, 0);
    current = &fiber;
    swapcontext(&starter, &context);
  }
}

std::string why_stuck() {
  for (const Fiber& fiber : fibers) {
    if (!fiber.waits_at) continue;
    int together = 0;
    for (const Fiber& other : fibers) together += other.waits_at == fiber.waits_at;
    return name_of(fiber) + " waits at " + fiber.waits_at + " for ever, with " +
           std::to_string(together - 1) + " others; " +
           std::to_string(static_cast<int>(fibers.size()) - running) + " of " +
           std::to_string(fibers.size()) + " threads have ended";
  }
  return "no thread can go on";
}

void check_canaries() {
  for (std::size_t i = 0; i < kCanaryBytes; ++i) {
    if (shared[i] != kCanary || shared[kCanaryBytes + shared_size + i] != kCanary) {
      error = "block " + text(blockIdx) + " wrote outside its dynamic shared memory of " +
              std::to_string(shared_size) + " bytes";
    }
  }
}

void run_block() {
  std::memset(dynamic_shared(), kPoison, shared_size);
  for (const Static& one : statics()) std::memset(one.storage, kPoison, one.bytes);
  running = static_cast<int>(fibers.size());
  direction = (blockIdx.x + blockIdx.y + blockIdx.z) % 2 == 0 ? 1 : -1;
  for (Warp& warp : warps) warp.ready = ~0U;
  for (Fiber& fiber : fibers) fiber.copies.clear();
  current = nullptr;
  yield(scheduler);
  if (error.empty() && running > 0) error = why_stuck();
  if (error.empty()) check_canaries();
  if (!error.empty()) throw std::runtime_error("CUDA emulation: " + error);
}

}  // namespace

void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes,
              const std::function<void()>& thread) {
  const std::lock_guard lock(one_launch);
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads % kLanes != 0 || threads > 1024) {
    throw std::runtime_error("CUDA emulation: block: expected whole warps and at most 1024 " +
                             std::string("threads, got ") + std::to_string(threads));
  }
  if (shared_bytes > static_cast<std::size_t>(most_shared_bytes) || grid.y > 65535 ||
      grid.z > 65535) {
    throw std::runtime_error("CUDA emulation: launch: more than a GPU takes: " +
                             std::to_string(shared_bytes) + " bytes of shared memory, grid y " +
                             std::to_string(grid.y) + ", grid z " + std::to_string(grid.z));
  }
  body = &thread;
  gridDim = grid;
  blockDim = block;
  shared_size = shared_bytes;
  shared.assign(shared_bytes + 2 * kCanaryBytes + 128, kCanary);
  error.clear();
  for (Barrier& one : barriers) one = Barrier{};
  make_fibers(block);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block();
      }
    }
  }
}

unsigned char* dynamic_shared() { return shared.data() + kCanaryBytes; }

bool poison_at_each_block(void* storage, std::size_t bytes) {
  std::memset(storage, kPoison, bytes);
  statics().push_back({storage, bytes});
  return true;
}

void fail(const char* what) {
  throw std::runtime_error((current ? name_of(*current) + ": " : std::string()) + what);
}

void check_shared(const char* instruction, const void* address, std::size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(address);
  const auto offset = static_cast<std::size_t>(at - dynamic_shared());
  if (at < dynamic_shared() || offset + bytes > shared_size) {
    throw std::runtime_error(name_of(*current) + ": " + instruction + " at offset " +
                             std::to_string(at - dynamic_shared()) + " of " +
                             std::to_string(shared_size) + " bytes of shared memory");
  }
  if (offset % bytes != 0) {
    throw std::runtime_error(name_of(*current) + ": " + instruction + " at offset " +
                             std::to_string(offset) + ", not a multiple of " +
                             std::to_string(bytes));
  }
}

bool barrier(int id, int threads, bool vote) {
  Barrier& barrier = barriers[id];
  Fiber& self = *current;
  if (barrier.arrived.empty()) {
    barrier.threads = threads;
    barrier.vote = false;
  }
  barrier.vote = barrier.vote || vote;
  if (barrier.threads != threads) fail("other threads expect another number at this barrier");
  if (static_cast<int>(barrier.arrived.size()) + 1 < threads) {
    barrier.arrived.push_back(&self);
    wait_at(id == 0 ? "__syncthreads" : "a named barrier");
    return self.vote;
  }
  for (Fiber* fiber : barrier.arrived) {
    fiber->vote = barrier.vote;
    warp_of(*fiber).ready |= bit(*fiber);
  }
  barrier.arrived.clear();
  return barrier.vote;
}

int lane() { return current->lane; }

void meet(const char* instruction, void* brought, void (*act)(void* const* lanes)) {
  Fiber& self = *current;
  Warp& warp = warp_of(self);
  if (warp.arrived == 0) warp.instruction = instruction;
  if (std::strcmp(warp.instruction, instruction) != 0) {
    throw std::runtime_error(name_of(self) + " came to " + instruction +
                             " while lanes of its warp wait at " + warp.instruction);
  }
  warp.brought[self.lane] = brought;
  warp.arrived |= bit(self);
  if (warp.arrived != ~0U) return wait_at(instruction);
  act(warp.brought);
  warp.arrived = 0;
  warp.ready = ~0U;
}

void copy_async(void* to, const void* from, int bytes) {
  check_shared("cp.async", to, 16);
  if (bytes > 0 && reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    fail("cp.async from an address that is not a multiple of 16");
  }
  std::memset(to, kPoison, 16);
  current->copies.push_back({to, from, bytes, current->group});
}

void commit_copies() { ++current->group; }

void wait_for_copies(int groups_left) {
  std::vector<Copy>& copies = current->copies;
  std::size_t done = 0;
  for (; done < copies.size() && copies[done].group < current->group - groups_left; ++done) {
    const Copy& copy = copies[done];
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.bytes));
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace pympa::cuda::emulated
