// Tiles of 16-bit elements in shared memory, in panels of 64 columns:
//
//   panel [rows][8 chunks of 16 bytes], chunk c of row r at index c ^ (r % 8)
//
// so that the eight rows that ldmatrix reads at a time are in different banks, and a step of 16
// columns flips two bits of an address.
#pragma once

#include "cuda/mma.hpp"

namespace pympa::cuda {

constexpr int kPanel = 64;      // columns: 128 bytes, all banks once
constexpr int kRowBytes = 128;  // of a panel
constexpr int kChunk = 8;       // elements of one 16-byte access
constexpr int kStepBytes = 32;  // the 16 columns of one mma

__host__ __device__ constexpr int panels_of(int columns) { return (columns + kPanel - 1) / kPanel; }

__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Eight elements of any alignment, zero from `columns` on.
__device__ __forceinline__ uint4 gather_chunk(const std::uint16_t* row, int column, int columns) {
  std::uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = column + 2 * i;
    const std::uint32_t low = at < columns ? row[at] : 0;
    const std::uint32_t high = at + 1 < columns ? row[at + 1] : 0;
    pairs[i] = low | high << 16;
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Starts loading kRows rows of `panels` panels. row_at(i) points to a row of `columns` elements, or
// is null for zeros; columns past the end are zeros. Aligned rows (16 bytes) arrive after a wait,
// others at once; other threads see either after a barrier.
template <int kRows, int kThreads, class RowAt>
__device__ __forceinline__ void load_tile(unsigned char* tile, int columns, int panels,
                                          bool aligned, RowAt&& row_at) {
  constexpr int kRowsAtOnce = kThreads / kChunk;
  static_assert(kRows % kRowsAtOnce == 0);
  const int thread = static_cast<int>(threadIdx.x);
  const int row0 = thread / kChunk, column0 = thread % kChunk * kChunk;
  unsigned char* target = tile + chunk_offset(row0, thread % kChunk);
#pragma unroll
  for (int i = 0; i < kRows; i += kRowsAtOnce) {
    const std::uint16_t* row = row_at(row0 + i);
    for (int panel = 0; panel < panels; ++panel) {
      const int column = panel * kPanel + column0;
      unsigned char* to = target + panel * (kRows * kRowBytes) + i * kRowBytes;
      if (aligned) {
        const int bytes = min(max(columns - column, 0), kChunk) * 2;
        copy_async(to, row + column, row ? bytes : 0);
      } else {
        *reinterpret_cast<uint4*>(to) = gather_chunk(row, column, row ? columns : 0);
      }
    }
  }
}

// The same for rows of whole, aligned chunks, `stride` elements apart, of which [first, last) are
// there: a pointer that moves on takes a fraction of the instructions of an address for each chunk.
template <int kRows, int kThreads, int kPanels>
__device__ __forceinline__ void load_even_tile(unsigned char* tile, int columns,
                                               const std::uint16_t* rows, std::uint32_t stride,
                                               int first, int last) {
  constexpr int kRowsAtOnce = kThreads / kChunk;
  static_assert(kRows % kRowsAtOnce == 0);
  const int thread = static_cast<int>(threadIdx.x);
  const int row0 = thread / kChunk, column0 = thread % kChunk * kChunk;
  const std::uint16_t* from = rows + static_cast<std::uint32_t>(row0) * stride + column0;
  unsigned char* to = tile + chunk_offset(row0, thread % kChunk);
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    const bool inside = panel * kPanel + column0 < columns;
    const std::uint16_t* at = from + panel * kPanel;
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
      const bool is_there = inside && row0 + i >= first && row0 + i < last;
      copy_async(to + panel * (kRows * kRowBytes) + i * kRowBytes, at, is_there ? 16 : 0);
      at += kRowsAtOnce * stride;
    }
  }
}

}  // namespace pympa::cuda
