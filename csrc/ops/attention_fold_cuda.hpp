// The work of a warp on a key tile, in its registers: scores, softmax, product with V
// (FlashAttention-2, Dao 2023; online softmax, Milakov & Gimelshein 2018).
//
//   Q [rows, head_dim] x K^T [head_dim, 64]        -> S float32, a fragment
//   S -> P = exp2(S scale log2(e) - max log2(e))   -> 16 bits; row_max
//   P [rows, 64] x [V | 1] [64, v_head_dim + 1]    -> out = out * rescale + ..., row_sum likewise
//
// A warp owns 16 kTiles rows. The sum of rounded probabilities is one more column of the product:
// that costs a tensor core less than the ALUs, and has the same error as `out`.
#pragma once

#include "ops/attention_cuda.hpp"

namespace pympa::cuda {

// kVPanels: 64 columns each of V. kRowGroups warps (times 16 kTiles rows) stand below each other;
// kColumnGroups warps share their rows, and each has its share of a tile's keys and of V's columns.
// kEven: the properties of most calls, see is_even, are known to the compiler.
template <class Element, int kPanelsOfV, int kTilesOfWarp, int kGroupsOfRows, int kGroupsOfColumns,
          bool kIsEven = false>
struct AttendShape {
  using T = Element;
  static constexpr int kVPanels = kPanelsOfV, kTiles = kTilesOfWarp, kRowGroups = kGroupsOfRows,
                       kColumnGroups = kGroupsOfColumns;
  static constexpr bool kEven = kIsEven;
  static constexpr int kThreads = kWarp * kRowGroups * kColumnGroups;
  static constexpr int kWarpRows = 16 * kTiles, kRows = kWarpRows * kRowGroups;
  static constexpr int kWarpKeys = kKeys / kColumnGroups;
  static constexpr int kWarpColumns = kVPanels * kPanel / kColumnGroups;
  static constexpr int kPBytes = kColumnGroups > 1 ? kRows * kRowBytes : 0;
  static constexpr int kMaximaBytes =
      kColumnGroups > 1 ? kColumnGroups * kRows * static_cast<int>(sizeof(float)) : 0;
  static constexpr int kVBytes = kVPanels * kKeys * kRowBytes;
};

// Whether K has as many panels as V, all rows are whole aligned chunks, K and V have a buffer each,
// and scores take a positive factor and no more.
template <class Shape>
bool is_even(const AttendParams& params) {
  return panels_of(params.head_dim) == Shape::kVPanels &&
         panels_of(params.v_head_dim) == Shape::kVPanels && params.head_dim % kChunk == 0 &&
         params.v_head_dim % kChunk == 0 && params.k_aligned && params.v_aligned &&
         !params.one_buffer && params.softcap == 0.0F && params.scale > 0.0F;
}

// Panels of Q and K.
template <class Shape>
__device__ __forceinline__ int panels_of_k(const AttendParams& params) {
  return Shape::kEven ? Shape::kVPanels : panels_of(params.head_dim);
}

template <class Shape>
__device__ __forceinline__ bool has_one_buffer(const AttendParams& params) {
  return !Shape::kEven && params.one_buffer;
}

// The rows, keys and columns of this thread.
template <class Shape>
struct Place {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  // Constants where there is one group: a barrier whose number is known takes one, others all 16.
  const int row_group = Shape::kRowGroups > 1 ? warp / Shape::kColumnGroups : 0;
  const int column_group = Shape::kRowGroups > 1 ? warp % Shape::kColumnGroups : warp;
  const int row0 = row_group * Shape::kWarpRows;           // of the warp in the block
  const int key0 = column_group * Shape::kWarpKeys;        // of its scores in the tile
  const int column0 = column_group * Shape::kWarpColumns;  // of its output

  // Row of the block that accumulators [tile][..][2 half] and [2 half + 1] belong to.
  __device__ __forceinline__ int row(int tile, int half) const {
    return row0 + 16 * tile + 8 * half + lane / 4;
  }
};

template <class Shape>
using Scores = float[Shape::kTiles][Shape::kWarpKeys / 8][4];

template <class Shape>
__device__ __forceinline__ void clear(Scores<Shape>& s) {
#pragma unroll
  for (int m = 0; m < Shape::kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Shape::kWarpKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0F;
    }
  }
}

// S += Q K^T over one panel of 64 columns.
template <class Shape>
__device__ __forceinline__ void score_panel(Scores<Shape>& s, const unsigned char* q,
                                            const unsigned char* k, const Place<Shape>& place) {
  using T = typename Shape::T;
  const int q_offset = chunk_offset(place.row0 + row_of_a(place.lane), chunk_of_a(place.lane));
  const int k_offset = chunk_offset(place.key0 + row_of_b(place.lane), chunk_of_b(place.lane));
#pragma unroll
  for (int step = 0; step < kPanel / 16; ++step) {
    std::uint32_t a[Shape::kTiles][4];
#pragma unroll
    for (int m = 0; m < Shape::kTiles; ++m) {
      load_matrices<false>(a[m], q + (q_offset ^ step * kStepBytes) + m * 16 * kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < Shape::kWarpKeys / 8; n += 2) {
      std::uint32_t b[4];
      load_matrices<false>(b, k + (k_offset ^ step * kStepBytes) + n * 8 * kRowBytes);
#pragma unroll
      for (int m = 0; m < Shape::kTiles; ++m) {
        mma<T>(s[m][n], a[m], b[0], b[1]);
        mma<T>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// S += Q K^T. With a known number of panels, fragments are loaded while others are multiplied.
template <class Shape>
__device__ __forceinline__ void score(Scores<Shape>& s, const unsigned char* q,
                                      const unsigned char* k, int panels,
                                      const Place<Shape>& place) {
  constexpr int kQBytes = Shape::kRows * kRowBytes, kKBytes = kKeys * kRowBytes;
  if constexpr (Shape::kEven) {
#pragma unroll
    for (int panel = 0; panel < Shape::kVPanels; ++panel) {
      score_panel<Shape>(s, q + panel * kQBytes, k + panel * kKBytes, place);
    }
  } else {
    for (int panel = 0; panel < panels; ++panel, q += kQBytes, k += kKBytes) {
      score_panel<Shape>(s, q, k, place);
    }
  }
}

// The running state of a warp's rows and of its columns, and how a tile of scores moves it on.
template <class Shape>
struct WarpState {
  using T = typename Shape::T;
  static constexpr int kTiles = Shape::kTiles, kColumnTiles = Shape::kWarpColumns / 8;

  float out[kTiles][kColumnTiles][4];
  float row_sum[kTiles][4];  // columns of ones: [2 half] and [2 half + 1] are the same
  float row_max[kTiles][2];  // natural log

  // No key seen yet.
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      row_max[m][0] = row_max[m][1] = -kInfinity;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        row_sum[m][i] = 0.0F;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) out[m][n][i] = 0.0F;
      }
    }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[kTiles][2]) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        row_sum[m][i] *= factor[m][i / 2];
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) out[m][n][i] *= factor[m][i / 2];
      }
    }
  }

  // Largest score of each row; those of the warps that share the rows go through shared memory.
  __device__ __forceinline__ void tile_maxima(const Scores<Shape>& s, float (&largest)[kTiles][2],
                                              float* maxima, const Place<Shape>& place) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = -kInfinity;
#pragma unroll
        for (int n = 0; n < Shape::kWarpKeys / 8; ++n) {
          most = fmaxf(most, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 2));
        largest[m][half] = most;
        if (Shape::kColumnGroups > 1 && place.lane % 4 == 0) {
          maxima[place.column_group * Shape::kRows + place.row(m, half)] = most;
        }
      }
    }
    if constexpr (Shape::kColumnGroups > 1) {
      barrier(1 + place.row_group, kWarp * Shape::kColumnGroups);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int group = 0; group < Shape::kColumnGroups; ++group) {
            largest[m][half] =
                fmaxf(largest[m][half], maxima[group * Shape::kRows + place.row(m, half)]);
          }
        }
      }
    }
  }

  // Scores become probabilities, and what was summed before shrinks to the new maximum. A natural
  // score is `unit` times a score here.
  __device__ __forceinline__ void exponentials(Scores<Shape>& s, float unit, float* maxima,
                                               const Place<Shape>& place) {
    float largest[kTiles][2], factor[kTiles][2];
    tile_maxima(s, largest, maxima, place);
    bool same = true;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float old = row_max[m][half], now = fmaxf(old, largest[m][half] * unit);
        factor[m][half] = now == old ? 1.0F : exp2_approximate((old - now) * kLog2E);
        same = same && now == old;
        row_max[m][half] = now;
        // A row that has seen no key keeps -inf; 0 in its place makes 2^(-inf - 0) = 0, not NaN.
        const float shift = now == -kInfinity ? 0.0F : now * kLog2E;
#pragma unroll
        for (int n = 0; n < Shape::kWarpKeys / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = exp2_approximate(fmaf(s[m][n][i], unit * kLog2E, -shift));
          }
        }
      }
    }
    // Late tiles seldom hold a new maximum, and a factor of 1 changes no bit.
    if (!__all_sync(0xffffffffU, same)) rescale(factor);
  }

  // Rounded probabilities to where all warps that share their rows read them.
  __device__ __forceinline__ void share(const Scores<Shape>& s, unsigned char* p,
                                        const Place<Shape>& place) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < Shape::kWarpKeys / 8; ++n) {
          const int offset = chunk_offset(place.row(m, half), place.key0 / 8 + n);
          *reinterpret_cast<std::uint32_t*>(p + offset + place.lane % 4 * 4) =
              pack<T>(s[m][n][2 * half], s[m][n][2 * half + 1]);
        }
      }
    }
    barrier(1 + place.row_group, kWarp * Shape::kColumnGroups);
  }

  // out += P V and row_sum += P 1. P is in `s`, or in `p` where warps share rows.
  __device__ __forceinline__ void multiply_values(const Scores<Shape>& s, const unsigned char* p,
                                                  const unsigned char* v,
                                                  const Place<Shape>& place) {
    const std::uint32_t ones = pack<T>(1.0F, 1.0F);
    const int p_offset = chunk_offset(place.row0 + row_of_a(place.lane), chunk_of_a(place.lane));
    const int v_offset = chunk_offset(row_of_a(place.lane), chunk_of_a(place.lane));
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      std::uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        if constexpr (Shape::kColumnGroups > 1) {
          load_matrices<false>(a[m], p + (p_offset ^ step * kStepBytes) + m * 16 * kRowBytes);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float (&pair)[4] = s[m][2 * step + i / 2];
            a[m][i] = pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
          }
        }
        mma<T>(row_sum[m], a[m], ones, ones);
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        const int column = place.column0 + n * 8;
        const int flip = column % kPanel / kChunk * 16;
        std::uint32_t b[4];
        load_matrices<true>(b, v + column / kPanel * (kKeys * kRowBytes) + (v_offset ^ flip) +
                                   step * 16 * kRowBytes);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma<T>(out[m][n], a[m], b[0], b[1]);
          mma<T>(out[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
};

// Relative error 5e-7: by the polynomial of cpu/math.hpp near 0, where the difference would cancel;
// +-1 where the exponential overflows or vanishes.
__device__ __forceinline__ float tanh_approximate(float x) {
  const float z = x * x;
  float p = fmaf(-0.00571704376F, z, 0.0206505861F);
  p = fmaf(p, z, -0.0537434965F);
  p = fmaf(p, z, 0.133314908F);
  p = fmaf(p, z, -0.333332837F);
  const float far = 1.0F - __fdividef(2.0F, 1.0F + exp2_approximate(2.0F * kLog2E * x));
  return z < 0.390625F ? fmaf(p * z, x, x) : far;
}

// Makes scores natural ones where that is more than a positive factor; returns that factor.
template <class Shape>
__device__ __forceinline__ float natural_unit(Scores<Shape>& s, float scale, float softcap) {
  if (Shape::kEven || (softcap == 0.0F && scale > 0.0F)) return scale;
  const float inverse = 1.0F / softcap;
#pragma unroll
  for (int m = 0; m < Shape::kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Shape::kWarpKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = s[m][n][i] * scale;
        s[m][n][i] = softcap > 0.0F ? softcap * tanh_approximate(x * inverse) : x;
      }
    }
  }
  return 1.0F;
}

// Scores of keys at or after position `base` that a row does not see become -inf. position(row) is
// that of a row of the block, `keys` what there is of the tile.
template <class Shape, class Position>
__device__ __forceinline__ void mask(Scores<Shape>& s, const AttendParams& params, int base,
                                     Span keys, const Place<Shape>& place, Position&& position) {
#pragma unroll
  for (int m = 0; m < Shape::kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Span seen = visible(params, position(place.row(m, half)));
      const int first = max(seen.first, keys.first), last = min(seen.last, keys.last);
      const int key0 = base + place.key0 + place.lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Shape::kWarpKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = key0 + 8 * n + i;
          if (key < first || key >= last) s[m][n][2 * half + i] = -kInfinity;
        }
      }
    }
  }
}

}  // namespace pympa::cuda
