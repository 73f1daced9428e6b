// The product of tiles: up to 2 x 2 of them, so that each operand that is loaded is used twice, and
// four sums hide how long an instruction takes.
//
// One operand stays in L1 from one product to the next. The other one comes from L2, and is loaded
// so that it does not push the first one out.
#pragma once

#include "cpu/amx_split.hpp"

namespace pympa::PYMPA_ISA {

// 32 rows of A: 16 that are `row` bytes apart, and 16 more from `next` bytes on.
struct ARows {
  const char* at;
  int64_t row, next, step, piece;
};

// Rows of a product in scratch that are still to be added to where they belong: Own::add_row takes
// the next one. Two a step are 32 in a block of 512 terms, while tiles work on another product.
template <class Own>
struct PendingRows {
  int64_t rows = 0;

  PYMPA_INLINE void add_some() {
    for (int i = 0; i < 2 && rows > 0; ++i) static_cast<Own*>(this)->add_row();
  }

  PYMPA_INLINE void add_all() {
    while (rows > 0) static_cast<Own*>(this)->add_row();
  }
};

enum class Streamed { kA, kB };

template <int kTile, bool kStreamed>
PYMPA_INLINE void load_operand(const char* at, int64_t stride) {
  if constexpr (kStreamed) {
    stream_tile<kTile>(at, stride);
  } else {
    load_tile<kTile>(at, stride);
  }
}

template <class T, Streamed kWhich, int kRowTiles, int kColumnTiles, int kIndex>
PYMPA_INLINE void add_products(const ARows& a, const char* a_step, const char* b) {
  constexpr PieceProduct kNow = Split<T>::kOrder[kIndex];
  constexpr PieceProduct kBefore = kIndex > 0 ? Split<T>::kOrder[kIndex - 1] : PieceProduct{-1, -1};
  if constexpr (kNow.a != kBefore.a) {
    constexpr bool kStreams = kWhich == Streamed::kA;
    load_operand<kTileA, kStreams>(a_step + kNow.a * a.piece, a.row);
    if constexpr (kRowTiles == 2) {
      load_operand<kTileA + 1, kStreams>(a_step + kNow.a * a.piece + a.next, a.row);
    }
  }
  if constexpr (kNow.b != kBefore.b) {
    constexpr bool kStreams = kWhich == Streamed::kB;
    load_operand<kTileB, kStreams>(b + kNow.b * kPieceBytes, kPairedLine);
    if constexpr (kColumnTiles == 2) {
      load_operand<kTileB + 1, kStreams>(b + kNow.b * kPieceBytes + kTileLine, kPairedLine);
    }
  }
  multiply_tiles<0, kTileA, kTileB>();
  if constexpr (kColumnTiles == 2) multiply_tiles<1, kTileA, kTileB + 1>();
  if constexpr (kRowTiles == 2) multiply_tiles<2, kTileA + 1, kTileB>();
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) multiply_tiles<3, kTileA + 1, kTileB + 1>();
  if constexpr (kIndex + 1 < Split<T>::kProducts) {
    add_products<T, kWhich, kRowTiles, kColumnTiles, kIndex + 1>(a, a_step, b);
  }
}

// C = A [rows, steps] x B [steps, columns] from zero, stored at `c` with rows `c_stride` floats
// apart, in whole tiles. meanwhile() is called at each step: vector work that has nothing to do
// with this product.
template <class T, Streamed kWhich, int kRowTiles, int kColumnTiles, class Meanwhile>
PYMPA_INLINE void product_of_tiles(const ARows& a, const char* b, int64_t steps, float* c,
                                   int64_t c_stride, Meanwhile&& meanwhile) {
  zero_tile<0>();
  if constexpr (kColumnTiles == 2) zero_tile<1>();
  if constexpr (kRowTiles == 2) zero_tile<2>();
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) zero_tile<3>();
  for (int64_t i = 0; i < steps; ++i) {
    add_products<T, kWhich, kRowTiles, kColumnTiles, 0>(a, a.at + i * a.step,
                                                        b + i * kStepBytes<T>);
    meanwhile();
  }
  const int64_t bytes = c_stride * static_cast<int64_t>(sizeof(float));
  store_tile<0>(c, bytes);
  if constexpr (kColumnTiles == 2) store_tile<1>(c + kTileRows, bytes);
  if constexpr (kRowTiles == 2) store_tile<2>(c + kTileRows * c_stride, bytes);
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) {
    store_tile<3>(c + kTileRows * c_stride + kTileRows, bytes);
  }
}

// The same for as many tiles as `rows` and `columns`, at most 32 each, need.
template <class T, Streamed kWhich, class Meanwhile>
PYMPA_INLINE void any_product_of_tiles(int64_t rows, int64_t columns, const ARows& a, const char* b,
                                       int64_t steps, float* c, int64_t c_stride,
                                       Meanwhile&& meanwhile) {
  if (rows > kTileRows) {
    columns > kTileRows ? product_of_tiles<T, kWhich, 2, 2>(a, b, steps, c, c_stride, meanwhile)
                        : product_of_tiles<T, kWhich, 2, 1>(a, b, steps, c, c_stride, meanwhile);
  } else {
    columns > kTileRows ? product_of_tiles<T, kWhich, 1, 2>(a, b, steps, c, c_stride, meanwhile)
                        : product_of_tiles<T, kWhich, 1, 1>(a, b, steps, c, c_stride, meanwhile);
  }
}

}  // namespace pympa::PYMPA_ISA
