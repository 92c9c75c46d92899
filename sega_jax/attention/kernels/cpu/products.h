// Small matrix products C [rows, kPanel] (+)= A [rows, units] B [units, kPanel], float32 sums, three ways.
//
// A "unit" is 32 bits: a float, or two bfloat16 that lie one after the other along the contracted axis.  A has rows of
// units, B is a panel of kPanel neighbouring columns.  That is at once what fused multiply-adds, AVX-512's bfloat16
// dot products and AMX tiles read, so packing is the same for all of them.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) || defined(SEGA_SOFTWARE_TILES)
#define SEGA_TILES
#endif
#if defined(SEGA_TILES) && !defined(SEGA_SOFTWARE_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sega {

#if defined(__AVX512F__)
constexpr int kRows = 8;  // rows whose sums stay in registers
#else
constexpr int kRows = 4;
#endif
constexpr int kColumns = 2;  // vectors of columns
constexpr int kPanel = kColumns * kLanes;

// Weights of two vectors of neighbouring keys as bfloat16, to nearest; they are not negative.
inline void store_pairs(uint16_t* to, Floats first, Floats second) {
#if defined(__AVX512BF16__)
  store(to, (Words)_mm512_cvtne2ps_pbh(second, first));
#else
  for (const Floats x : {first, second}) {
    Words bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits += 0x7fff + ((bits >> 16) & 1);
    store(to, __builtin_convertvector(bits >> 16, Halves));
    to += kLanes;
  }
#endif
}

struct FloatUnits {
  static constexpr bool kPairs = false;
  static Floats multiply_add(Floats sum, uint32_t a, Words b) {
    float x;
    Floats y;
    std::memcpy(&x, &a, sizeof x);
    std::memcpy(&y, &b, sizeof y);
    return sum + x * y;
  }
};

#if defined(__AVX512BF16__)
struct PairUnits {
  static constexpr bool kPairs = true;
  static Floats multiply_add(Floats sum, uint32_t a, Words b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(int(a)));
  }
};
#endif

// One lane per column.
template <class Units>
struct Lanewise {
  static constexpr bool kPairs = Units::kPairs;
  static constexpr int kStep = kRows;  // rows come in multiples of this
  static constexpr int kDepth = 1;     // and units of this
  static constexpr int kQueries = 256;  // queries that share one packing of the keys

  struct Session {};  // what a thread holds while it multiplies

  template <bool add>
  static void product(float* c, int64_t c_stride, const uint32_t* a, int64_t a_stride, const uint32_t* panel,
                      int64_t rows, int64_t units) {
    for (int64_t row = 0; row < rows; row += kRows, c += kRows * c_stride, a += kRows * a_stride) {
      Floats sums[kRows][kColumns];
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kColumns; ++j) sums[i][j] = Floats{};
      for (int64_t u = 0; u < units; ++u) {
        Words b[kColumns];
        for (int j = 0; j < kColumns; ++j) b[j] = load<Words>(panel + u * kPanel + j * kLanes);
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < kColumns; ++j)
            sums[i][j] = Units::multiply_add(sums[i][j], load<uint32_t>(a + i * a_stride + u), b[j]);
      }
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kColumns; ++j) {
          float* to = c + i * c_stride + j * kLanes;
          store(to, add ? load<Floats>(to) + sums[i][j] : sums[i][j]);
        }
    }
  }
};

#if defined(SEGA_TILES)

constexpr int kTile = 16;  // rows of a tile, and its units per row

#if defined(SEGA_SOFTWARE_TILES)

// AMX's tile registers and the four operations needed, as Intel's manual defines them, for tests on other processors.
namespace software {
inline thread_local uint32_t tiles[8][kTile][kTile];
inline void zero(int tile) { std::memset(tiles[tile], 0, sizeof tiles[tile]); }
inline void load(int tile, const void* from, int64_t stride) {
  for (int i = 0; i < kTile; ++i) std::memcpy(tiles[tile][i], static_cast<const char*>(from) + i * stride, 4 * kTile);
}
inline void store(int tile, void* to, int64_t stride) {
  for (int i = 0; i < kTile; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tiles[tile][i], 4 * kTile);
}
inline void multiply_add(int sums, int a, int b) {
  for (int m = 0; m < kTile; ++m)
    for (int k = 0; k < kTile; ++k)
      for (int n = 0; n < kTile; ++n) {
        float sum;
        std::memcpy(&sum, &tiles[sums][m][n], sizeof sum);
        const uint32_t x = tiles[a][m][k], y = tiles[b][k][n];
        sum += widen({uint16_t(x)}) * widen({uint16_t(y)});
        sum += widen({uint16_t(x >> 16)}) * widen({uint16_t(y >> 16)});
        std::memcpy(&tiles[sums][m][n], &sum, sizeof sum);
      }
}
}  // namespace software
#define SEGA_TILE_ZERO(tile) software::zero(tile)
#define SEGA_TILE_LOAD(tile, from, stride) software::load(tile, from, stride)
#define SEGA_TILE_STORE(tile, to, stride) software::store(tile, to, stride)
#define SEGA_TILE_MULTIPLY_ADD(sums, a, b) software::multiply_add(sums, a, b)

#else

#define SEGA_TILE_ZERO(tile) _tile_zero(tile)
#define SEGA_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define SEGA_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define SEGA_TILE_MULTIPLY_ADD(sums, a, b) _tile_dpbf16ps(sums, a, b)

#endif

// AMX: 2 x 2 tiles of sums.
struct Tiles {
  static constexpr bool kPairs = true;
  static constexpr int kStep = 2 * kTile;
  static constexpr int kDepth = kTile;
  static constexpr int kQueries = 512;  // products are fast enough for packing to count

  // Tile registers of the present thread, all of full size.
  struct Session {
#if !defined(SEGA_SOFTWARE_TILES)
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
      } shape;
      for (int tile = 0; tile < 8; ++tile) shape.row_bytes[tile] = 4 * kTile, shape.rows[tile] = kTile;
      asm volatile("" ::"r"(&shape) : "memory");  // not every compiler knows that all of it is read
      _tile_loadconfig(&shape);
    }
    ~Session() { _tile_release(); }
#endif
  };

  // Whether the processor has tiles and the system lets this process use them (Linux asks for a request).
  static bool usable() {
#if defined(SEGA_SOFTWARE_TILES)
    return true;
#elif defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }

  template <bool add>
  static void product(float* c, int64_t c_stride, const uint32_t* a, int64_t a_stride, const uint32_t* panel,
                      int64_t rows, int64_t units) {
    static_assert(kPanel == 2 * kTile);
    asm volatile("" ::: "memory");  // tile loads do not say that they read memory
    for (int64_t row = 0; row < rows; row += kStep, c += kStep * c_stride, a += kStep * a_stride) {
      if constexpr (add) {
        SEGA_TILE_LOAD(0, c, c_stride * 4);
        SEGA_TILE_LOAD(1, c + kTile, c_stride * 4);
        SEGA_TILE_LOAD(2, c + kTile * c_stride, c_stride * 4);
        SEGA_TILE_LOAD(3, c + kTile * c_stride + kTile, c_stride * 4);
      } else {
        SEGA_TILE_ZERO(0);
        SEGA_TILE_ZERO(1);
        SEGA_TILE_ZERO(2);
        SEGA_TILE_ZERO(3);
      }
      for (int64_t u = 0; u < units; u += kTile) {
        SEGA_TILE_LOAD(4, a + u, a_stride * 4);
        SEGA_TILE_LOAD(5, a + u + kTile * a_stride, a_stride * 4);
        SEGA_TILE_LOAD(6, panel + u * kPanel, kPanel * 4);
        SEGA_TILE_LOAD(7, panel + u * kPanel + kTile, kPanel * 4);
        SEGA_TILE_MULTIPLY_ADD(0, 4, 6);
        SEGA_TILE_MULTIPLY_ADD(1, 4, 7);
        SEGA_TILE_MULTIPLY_ADD(2, 5, 6);
        SEGA_TILE_MULTIPLY_ADD(3, 5, 7);
      }
      SEGA_TILE_STORE(0, c, c_stride * 4);
      SEGA_TILE_STORE(1, c + kTile, c_stride * 4);
      SEGA_TILE_STORE(2, c + kTile * c_stride, c_stride * 4);
      SEGA_TILE_STORE(3, c + kTile * c_stride + kTile, c_stride * 4);
    }
    asm volatile("" ::: "memory");
  }
};

#endif

}  // namespace sega
