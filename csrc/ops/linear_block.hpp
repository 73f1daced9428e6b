// Blocks of linear layers: what a thread works on at a time, and where its weights lie.
#pragma once

#include "cpu/pack.hpp"
#include "ops/linear.hpp"

namespace pympa::PYMPA_ISA {

constexpr int64_t kKBlock = 512;       // part of the contract on bits: never change it for speed
constexpr int64_t kColumnBlock = 512;  // x is repacked once for so many columns
constexpr int64_t kAlignment = 64;

// Rows and columns of one group's product.
struct Block {
  int64_t group, row, rows, column, columns;
};

// C [rows, columns] (row stride `stride`) of float32 sums.
struct Sums {
  float* at;
  int64_t stride;
};

template <class T>
using Panel = typename MathOf<T>::Linear::Stored;

template <class T>
int64_t panel_size(int64_t k) {
  return groups_of<typename MathOf<T>::Linear>(k) * kPanel;
}

// The first panel of a block's columns, from term k on.
template <class T>
const Panel<T>* panels_of(const LinearArgs& args, int which, const Block& block, int64_t k) {
  const auto* weight =
      static_cast<const char*>(args.packed[which]) + block.group * args.packed_bytes[which];
  return reinterpret_cast<const Panel<T>*>(weight) + block.column / kPanel * panel_size<T>(args.k) +
         k / MathOf<T>::Linear::kDepth * kPanel;
}

}  // namespace pympa::PYMPA_ISA
