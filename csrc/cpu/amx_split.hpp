// Operands of tiles. Tiles multiply bfloat16 only, so a float16 is written as the sum of two
// bfloat16 pieces, a float32 as the sum of three. Of the products of pieces the three, or six,
// largest are computed; the others are at most 2^-18, or 2^-25, of the whole product.
//
//   x = x_0 + x_1 (+ x_2), each piece the nearest bfloat16 to what is left: exact
//
// A product of pieces below 2^-126 becomes zero, as in any product of tiles. So a sum has an
// absolute error of some 2^-126 for each of its float32 products, which shows where all of them are
// below 2^-102.
//
// A float16 that is not finite, and a float32 that is large, not finite, or so small that a piece
// would be subnormal, cannot be split. Where a row of A or a column of B has one, its sums come
// from float32 multiply-adds in ascending order; the other rows and columns keep their bits.
#pragma once

#include "cpu/amx.hpp"
#include "cpu/pack.hpp"

namespace pympa::PYMPA_ISA {

// A product of piece `a` of A and piece `b` of B.
struct PieceProduct {
  int a, b;
};

// Products in the order in which they are added, for which one operand at most is loaded anew.
template <class T>
struct Split;
template <>
struct Split<BFloat> {
  static constexpr int kPieces = 1, kProducts = 1;
  static constexpr PieceProduct kOrder[] = {{0, 0}};
};
template <>
struct Split<Half> {
  static constexpr int kPieces = 2, kProducts = 3;
  static constexpr PieceProduct kOrder[] = {{0, 1}, {0, 0}, {1, 0}};
};
template <>
struct Split<float> {
  static constexpr int kPieces = 3, kProducts = 6;
  static constexpr PieceProduct kOrder[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {0, 0}, {2, 0}};
};

template <class T>
constexpr int kPieces = Split<T>::kPieces;

// Bytes of 32 terms of 32 columns of B, one piece: 16 rows of two tiles side by side.
constexpr int64_t kPieceBytes = kTileRows * kPairedLine;
template <class T>
constexpr int64_t kStepBytes = kPieces<T> * kPieceBytes;

PYMPA_INLINE int64_t steps_of(int64_t terms) { return (terms + kTileTerms - 1) / kTileTerms; }

// The nearest bfloat16, of two the larger.
PYMPA_INLINE V nearest_piece(V x) { return from_bits((bits_of(x) + 0x8000u) & 0xffff0000u); }

template <class T>
PYMPA_INLINE void split(V x, V (&pieces)[kPieces<T>]) {
  for (int i = 0; i + 1 < kPieces<T>; ++i) {
    pieces[i] = nearest_piece(x);
    x -= pieces[i];
  }
  pieces[kPieces<T> - 1] = x;
}

// All ones in the lanes that cannot be split.
template <class T>
PYMPA_INLINE VBits unsplittable(V x) {
  const VBits magnitude = bits_of(x) & 0x7fffffffu;
  if constexpr (__is_same(T, Half)) {
    return reinterpret_cast<VBits>(magnitude >= 0x7f800000u);
  } else {
    // 2^-102, so that the last piece is at least 2^-126; 2^59, so that 512 products never overflow.
    const VBits zero = reinterpret_cast<VBits>(magnitude == 0u);
    const VBits inside =
        reinterpret_cast<VBits>(magnitude - 0x0c800000u < 0x5d000000u - 0x0c800000u);
    return ~(zero | inside);
  }
}

PYMPA_INLINE bool any_bit(VBits x) {
  uint32_t any = 0;
  for (int lane = 0; lane < W; ++lane) any |= x[lane];
  return any != 0;
}

// The leading halves of two vectors, as 32 bfloat16 in order.
PYMPA_INLINE VShorts joined(V first, V second) {
  VShorts odd;
  for (int lane = 0; lane < 2 * W; ++lane) odd[lane] = static_cast<uint16_t>(2 * lane + 1);
  return __builtin_shuffle(reinterpret_cast<VShorts>(first), reinterpret_cast<VShorts>(second),
                           odd);
}

// The leading halves of two vectors as pairs of bfloat16, a row of B.
PYMPA_INLINE VBits paired(V even, V odd) { return (bits_of(even) >> 16) | bits_of(odd); }

// A row of A: the lines of 32 terms, `step` bytes apart, and of their pieces, `piece` bytes apart.
struct RowLines {
  char* at;
  int64_t step, piece;

  PYMPA_INLINE char* line(int64_t index, int number) const {
    return at + index * step + number * piece;
  }
};

// Fills the lines of a row of `length` terms, with zeros to the end of a step. The lines of a row
// that cannot be split hold it as it is; returns whether this is one.
template <class T>
PYMPA_INLINE bool split_row(const T* x, int64_t length, const RowLines& row) {
  VBits special{};
  for (int64_t i = 0; i < length; i += kTileTerms) {
    const int64_t index = i / kTileTerms, count = length - i;
    if constexpr (kPieces<T> == 1) {
      VBits whole{};
      if (count >= kTileTerms) {
        whole = load_raw<VBits>(reinterpret_cast<const uint32_t*>(x + i));
      } else {
        __builtin_memcpy(&whole, x + i, static_cast<size_t>(count) * sizeof(T));
      }
      store_raw(reinterpret_cast<uint32_t*>(row.line(index, 0)), whole);
    } else {
      const V low = load(x + i, count), high = count > W ? load(x + i + W, count - W) : V{};
      special |= unsplittable<T>(low) | unsplittable<T>(high);
      V first[kPieces<T>], second[kPieces<T>];
      split<T>(low, first);
      split<T>(high, second);
      for (int piece = 0; piece < kPieces<T>; ++piece) {
        store_raw(reinterpret_cast<uint16_t*>(row.line(index, piece)),
                  joined(first[piece], second[piece]));
      }
    }
  }
  if (kPieces<T> == 1 || !any_bit(special)) return false;
  constexpr int64_t kOfLine = kTileLine / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < length; i += kOfLine) {
    __builtin_memcpy(row.line(i / kTileTerms, static_cast<int>(i % kTileTerms / kOfLine)), x + i,
                     static_cast<size_t>(min_of(kOfLine, length - i)) * sizeof(T));
  }
  return true;
}

// Term k of a row that `split_row` has filled.
template <class T>
PYMPA_INLINE float term_of(const RowLines& row, bool special, int64_t k) {
  const int64_t index = k / kTileTerms, at = k % kTileTerms;
  if (special) {
    constexpr int64_t kOfLine = kTileLine / static_cast<int64_t>(sizeof(T));
    const char* line = row.line(index, static_cast<int>(at / kOfLine));
    return load(reinterpret_cast<const T*>(line) + at % kOfLine, 1)[0];
  }
  float sum = 0.0f;
  for (int piece = kPieces<T>; piece-- > 0;) {
    sum += load(reinterpret_cast<const BFloat*>(row.line(index, piece)) + at, 1)[0];
  }
  return sum;
}

// All ones in the lanes of columns that cannot be split.
struct ColumnMask {
  VBits lanes[2]{};

  bool any() const { return any_bit(lanes[0] | lanes[1]); }
};

// Rows [first, last) of a matrix with rows `stride` elements apart, `columns` <= 32 wide, become
// rows of B; every step that they touch is written in full, with zeros for the rest.
template <class T>
PYMPA_NOINLINE ColumnMask split_panel(const T* from, int64_t stride, int64_t first, int64_t last,
                                      int64_t columns, char* b) {
  ColumnMask special;
  for (int64_t k = first / kTileTerms * kTileTerms; k < round_up(last, kTileTerms); k += 2) {
    char* target = b + k / kTileTerms * kStepBytes<T> + k % kTileTerms / 2 * kPairedLine;
    for (int i = 0; i < 2; ++i) {
      const int64_t count = columns - i * W;
      const T* at = from + k * stride + i * W;
      V even{}, odd{};
      if (count > 0 && k >= first && k < last) even = load(at, count);
      if (count > 0 && k + 1 >= first && k + 1 < last) odd = load(at + stride, count);
      special.lanes[i] |= unsplittable<T>(even) | unsplittable<T>(odd);
      V of_even[kPieces<T>], of_odd[kPieces<T>];
      split<T>(even, of_even);
      split<T>(odd, of_odd);
      for (int piece = 0; piece < kPieces<T>; ++piece) {
        store_raw(reinterpret_cast<uint32_t*>(target + piece * kPieceBytes + i * kTileLine),
                  paired(of_even[piece], of_odd[piece]));
      }
    }
  }
  return special;
}

// Sums of terms [first, last) of one row and `columns` <= 32 columns by multiply-adds; rows of B
// lie `stride` elements apart.
template <class T>
PYMPA_NOINLINE void multiply_row(const RowLines& row, bool special, const T* b, int64_t stride,
                                 int64_t first, int64_t last, int64_t columns, V (&sums)[2]) {
  sums[0] = sums[1] = V{};
  for (int64_t k = first; k < last; ++k) {
    const V x = splat(term_of<T>(row, special, k));
    for (int i = 0; i < 2 && i * W < columns; ++i) {
      sums[i] = fma(x, load(b + k * stride + i * W, columns - i * W), sums[i]);
    }
  }
}

// Lanes of `a` where `mask` is all ones, else those of `b`.
PYMPA_INLINE V chosen(VBits mask, V a, V b) {
  return from_bits((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

}  // namespace pympa::PYMPA_ISA
