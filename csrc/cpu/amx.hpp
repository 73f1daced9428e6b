// Matrix tiles (Intel AMX): registers of up to 16 rows of 64 bytes, and products of bfloat16 pairs.
//
//   C [16, 16] float32 += A [16, 32] x B [32, 16], B as 16 rows of 16 pairs
//
// For an element and one instruction, by fused steps that round to nearest: e and o, from zero, add
// up a b of the even and of the odd terms, ascending; then C + (e + o). Subnormal factors count as
// zero and subnormal results become zero, whatever MXCSR says. A product never depends on other
// rows or columns, nor on which of the two factors is A, except that which NaN it is may.
//
// amx_emulated is the same over a plain model of the instructions, with the same bits.
//
// The instructions are spelled out: in GCC 12, `_tile_loadconfig` reads 8 of 64 bytes as far as the
// optimizer knows, and `_tile_loadd` none.
#pragma once

#include "cpu/simd.hpp"

namespace pympa::PYMPA_ISA {

constexpr int64_t kTileRows = 16;     // and columns of C
constexpr int64_t kTileLine = 64;     // bytes of a row
constexpr int64_t kTileTerms = 32;    // of one product
constexpr int64_t kPairedLine = 128;  // bytes of a row of B for two tiles side by side

// Numbers of the registers of a product of 2 x 2 tiles: C in 0 to 3.
constexpr int kTileA = 4, kTileB = 6;

// What `ldtilecfg` reads.
struct TileConfig {
  alignas(64) uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

#if PYMPA_EMULATED

struct TileRegisters {
  TileConfig config{.palette = 0};
  VBits line[8][kTileRows];
};
inline thread_local TileRegisters tile_registers;

// What the processor would refuse: #UD or #GP.
inline void require(bool allowed) {
  if (!allowed) __builtin_trap();
}

template <int kTile>
void require_configured() {
  const TileConfig& config = tile_registers.config;
  require(config.palette == 1 && config.rows[kTile] > 0 && config.rows[kTile] <= kTileRows &&
          config.bytes[kTile] > 0 && config.bytes[kTile] <= kTileLine);
}

inline void configure_tiles(const TileConfig& config) {
  tile_registers = {};
  tile_registers.config = config;
}

inline void release_tiles() { tile_registers = {}; }

template <int kTile>
void zero_tile() {
  require_configured<kTile>();
  for (VBits& line : tile_registers.line[kTile]) line = VBits{};
}

template <int kTile>
void load_tile(const void* at, int64_t stride) {
  zero_tile<kTile>();
  for (int row = 0; row < tile_registers.config.rows[kTile]; ++row) {
    __builtin_memcpy(&tile_registers.line[kTile][row], static_cast<const char*>(at) + row * stride,
                     tile_registers.config.bytes[kTile]);
  }
}

template <int kTile>
void stream_tile(const void* at, int64_t stride) {
  load_tile<kTile>(at, stride);
}

template <int kTile>
void store_tile(void* at, int64_t stride) {
  require_configured<kTile>();
  for (int row = 0; row < tile_registers.config.rows[kTile]; ++row) {
    __builtin_memcpy(static_cast<char*>(at) + row * stride, &tile_registers.line[kTile][row],
                     tile_registers.config.bytes[kTile]);
  }
}

// A float32 of `bits`; a subnormal one becomes a zero of its sign.
inline float flushed(uint32_t bits) {
  return __builtin_bit_cast(float, (bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

inline float flushed(float x) { return flushed(__builtin_bit_cast(uint32_t, x)); }

// a b + c. The processor rounds as if exponents had no bounds, and flushes what is then below the
// smallest normal number. A sum just below it rounds to it as a subnormal number, but is flushed.
// There `exact` has no rounding error.
inline float fused(float a, float b, float c) {
  constexpr float kLeast = 0x1p-126f;
  const float rounded = flushed(__builtin_fmaf(a, b, c));
  if (__builtin_fabsf(rounded) != kLeast) return rounded;
  const double exact = static_cast<double>(a) * b + c;
  return __builtin_fabs(exact) < 0x1p-126 - 0x1p-151 ? __builtin_copysignf(0.0f, rounded) : rounded;
}

template <int kC, int kA, int kB>
PYMPA_NOINLINE void multiply_tiles() {
  constexpr int kPairs = kTileTerms / 2, kColumns = kTileRows;
  static_assert(kC != kA && kC != kB && kA != kB);
  require_configured<kC>();
  const TileConfig& config = tile_registers.config;
  require(config.rows[kA] == config.rows[kC] && config.rows[kB] * 4 == config.bytes[kA] &&
          config.bytes[kB] == config.bytes[kC] && config.rows[kB] == kPairs);
  float b[kTileTerms][kColumns];
  for (int pair = 0; pair < kPairs; ++pair) {
    for (int i = 0; i < kColumns; ++i) {
      const uint32_t both = tile_registers.line[kB][pair][i];
      b[2 * pair][i] = flushed(both << 16);
      b[2 * pair + 1][i] = flushed(both & 0xffff0000u);
    }
  }
  for (int row = 0; row < tile_registers.config.rows[kC]; ++row) {
    float sums[2][kColumns] = {};  // of even and of odd terms
    for (int term = 0; term < kTileTerms; ++term) {
      const uint32_t both = tile_registers.line[kA][row][term / 2];
      const float a = flushed(term % 2 ? both & 0xffff0000u : both << 16);
      float* sum = sums[term % 2];
      float next[kColumns];
      for (int i = 0; i < kColumns; ++i) {
        next[i] = flushed(__builtin_fmaf(a, b[term][i], sum[i]));
      }
      uint32_t edge = 0;
      for (int i = 0; i < kColumns; ++i) {
        edge |= (__builtin_bit_cast(uint32_t, next[i]) & 0x7fffffffu) == 0x00800000u;
      }
      for (int i = 0; edge && i < kColumns; ++i) next[i] = fused(a, b[term][i], sum[i]);
      __builtin_memcpy(sum, next, sizeof next);
    }
    uint32_t c[kColumns];
    __builtin_memcpy(c, &tile_registers.line[kC][row], sizeof c);
    for (int i = 0; i < kColumns; ++i) {
      const float sum = __builtin_bit_cast(float, c[i]) + flushed(sums[0][i] + sums[1][i]);
      c[i] = __builtin_bit_cast(uint32_t, flushed(sum));
    }
    __builtin_memcpy(&tile_registers.line[kC][row], c, sizeof c);
  }
}

#else

PYMPA_INLINE void configure_tiles(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config));
}

PYMPA_INLINE void release_tiles() { asm volatile("tilerelease"); }

template <int kTile>
PYMPA_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kTile>
PYMPA_INLINE void load_tile(const void* at, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(stride), "i"(kTile) : "memory");
}

// For what L1 will not keep.
template <int kTile>
PYMPA_INLINE void stream_tile(const void* at, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
PYMPA_INLINE void store_tile(void* at, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(at), "r"(stride), "i"(kTile) : "memory");
}

template <int kC, int kA, int kB>
PYMPA_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

#endif

// Configures the tiles of this thread, and releases them at the end of the scope. What other code
// had in them before is lost.
class TileScope {
 public:
  TileScope() { configure(kTileRows); }
  ~TileScope() { release_tiles(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

  // A and C have `rows` rows, B has 16. All tiles are zero then.
  void configure(int64_t rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.bytes[tile] = kTileLine;
      config.rows[tile] = static_cast<uint8_t>(tile < kTileB ? rows : kTileRows);
    }
    configure_tiles(config);
  }
};

}  // namespace pympa::PYMPA_ISA
