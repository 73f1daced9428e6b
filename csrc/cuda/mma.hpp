// The tensor core and copy instructions of the kernels: inline PTX on a GPU, the documented layouts
// of its fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16") under emulation.
//
// g = lane / 4, t = lane % 4. A register holds two neighbours, the lower index in its lower half.
//   A [16 rows, 16]:  a0 (g, 2t) a1 (g + 8, 2t) a2 (g, 2t + 8) a3 (g + 8, 2t + 8)
//   B [16, 8 columns]: b0 (2t, g) b1 (2t + 8, g)
//   C [16 rows, 8]:   c0 c1 (g, 2t) c2 c3 (g + 8, 2t)
#pragma once

#include "cuda/convert.hpp"

namespace pympa::cuda {

// One element of a pair.
template <class T>
__device__ __forceinline__ float half_of(std::uint32_t pair, int which) {
  T half;
  const auto bits = static_cast<std::uint16_t>(pair >> 16 * which);
  memcpy(&half, &bits, sizeof half);
  return to_float(half);
}

#ifdef PYMPA_CUDA_EMULATED

namespace emulated {

struct Matrices {
  const void* row;
  std::uint32_t* result;
};

inline std::uint16_t element(Matrices* const* lanes, int matrix, int row, int column) {
  return static_cast<const std::uint16_t*>(lanes[matrix * 8 + row]->row)[column];
}

template <bool kTransposed>
void load_matrices(Matrices* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t low =
          kTransposed ? element(lanes, i, 2 * t, g) : element(lanes, i, g, 2 * t);
      const std::uint32_t high =
          kTransposed ? element(lanes, i, 2 * t + 1, g) : element(lanes, i, g, 2 * t + 1);
      lanes[lane]->result[i] = low | high << 16;
    }
  }
}

struct Product {
  float* d;
  const std::uint32_t* a;
  std::uint32_t b[2];
};

template <class T>
void multiply(Product* const* lanes) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Product& one = *lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = half_of<T>(one.a[i], half);
      }
      for (int i = 0; i < 2; ++i) b[2 * t + 8 * i + half][g] = half_of<T>(one.b[i], half);
      for (int i = 0; i < 2; ++i) d[g + 8 * i][2 * t + half] = one.d[2 * i + half];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace emulated

template <bool kTransposed>
void load_matrices(std::uint32_t (&to)[4], const void* row) {
  emulated::check_shared("ldmatrix", row, 16);
  emulated::Matrices mine{row, to};
  emulated::meet<emulated::Matrices, emulated::load_matrices<kTransposed>>(
      kTransposed ? "ldmatrix.trans" : "ldmatrix", mine);
}

template <class T>
void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  emulated::Product mine{d, a, {b0, b1}};
  emulated::meet<emulated::Product, emulated::multiply<T>>("mma.m16n8k16", mine);
}

template <class T>
std::uint32_t pack(float low, float high) {
  const auto bits = [](float x) { return std::bit_cast<std::uint16_t>(from_float<T>(x)); };
  return bits(low) | static_cast<std::uint32_t>(bits(high)) << 16;
}

template <class T>
std::uint32_t add_zero_times(std::uint32_t sum, std::uint32_t pair) {
  const auto add = [&](int i) { return half_of<T>(sum, i) + 0.0F * half_of<T>(pair, i); };
  return pack<T>(add(0), add(1));
}

inline float exp2_approximate(float x) { return std::exp2(x); }

inline void copy_async(void* to, const void* from, int bytes) {
  emulated::copy_async(to, from, bytes);
}
inline void commit_copies() { emulated::commit_copies(); }
template <int kGroupsLeft>
void wait_for_copies() {
  emulated::wait_for_copies(kGroupsLeft);
}

inline void barrier(int id, int threads) { emulated::barrier(id, threads); }

#else

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices of 16-bit elements; lane l gives row l % 8 of matrix l / 8, 16 bytes in shared
// memory.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(std::uint32_t (&to)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// d += a b, in float32.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
  if constexpr (sizeof(T) == 2 && __is_same(T, Half)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two elements in one register, rounded to nearest even.
template <class T>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  std::uint32_t pair;
  if constexpr (__is_same(T, Half)) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// Two sums, each plus zero times an element: 0 stays 0 but where an element is not finite.
template <class T>
__device__ __forceinline__ std::uint32_t add_zero_times(std::uint32_t sum, std::uint32_t pair) {
  if constexpr (__is_same(T, Half)) {
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0U));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0U));
  }
  return sum;
}

// 2^x with an error of 2 units in the last place; 0 for -inf and where it would be subnormal.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Copies `bytes` (0 to 16) and fills up to 16 with zeros; nothing is read if `bytes` is 0.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for this thread's copies but those of its latest groups; others see them after a barrier.
template <int kGroupsLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// A barrier of some warps of the block: `threads` of them, under an id from 1 to 15.
__device__ __forceinline__ void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#endif

// A [16, 16] and B [16 columns, 16] from shared memory as mma wants them: where this lane's 16
// bytes start. B of a product with a transpose lies in rows; plain B, like V, is turned on loading.
__device__ __forceinline__ int row_of_a(int lane) { return lane % 16; }
__device__ __forceinline__ int chunk_of_a(int lane) { return lane / 16; }
__device__ __forceinline__ int row_of_b(int lane) { return lane % 8 + lane / 16 * 8; }
__device__ __forceinline__ int chunk_of_b(int lane) { return lane / 8 % 2; }

}  // namespace pympa::cuda
