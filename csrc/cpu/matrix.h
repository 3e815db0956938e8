// The processor's matrix unit (Intel AMX): eight tiles of 16 rows x 64 bytes, and one instruction that multiplies two.
//
//   C[i][lane] += sum_k a[i][k] . b[k][lane]     i, k, lane < 16; a and b hold pairs of bf16, C floats
//
// a is 16 rows of a matrix as they lie, b 16 steps of a panel as it lies (pairs along k, as the vectors' dot product
// takes them), so that no operand needs a layout of its own. One such product takes 16 cycles and does what 512
// multiply-adds of a vector of 16 do; loads hide behind it.
//
// The tiles' shape is state of the thread: whoever multiplies holds a MatrixUnit.
#pragma once

#include "simd.h"

namespace nsk::NSK_ISA {

inline constexpr int kMatrixSide = 16;  // rows, units of k and lanes of a tile

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)

inline constexpr bool kHasMatrixUnit = true;

class MatrixUnit {
 public:
  MatrixUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) {
      config.bytes[t] = 64;
      config.rows[t] = kMatrixSide;
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~MatrixUnit() { asm volatile("tilerelease"); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

  // `stride`: bytes from row to row.
  template <int T>
  static NSK_INLINE void load(const void* from, ptrdiff_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static NSK_INLINE void store(void* to, ptrdiff_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static NSK_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int C, int A, int B>
  static NSK_INLINE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

#elif defined(NSK_EMULATE_AMX)

inline constexpr bool kHasMatrixUnit = true;

// The same in loops, for tests on processors that have none, and for sanitizers, which do not see what tiles access.
class MatrixUnit {
 public:
  MatrixUnit() { in_use() = true; }
  ~MatrixUnit() { in_use() = false; }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

  template <int T>
  static void load(const void* from, ptrdiff_t stride) {
    for (int i = 0; i < kMatrixSide; ++i) __builtin_memcpy(tile(T)[i], static_cast<const char*>(from) + i * stride, 64);
  }
  template <int T>
  static void store(void* to, ptrdiff_t stride) {
    for (int i = 0; i < kMatrixSide; ++i) __builtin_memcpy(static_cast<char*>(to) + i * stride, tile(T)[i], 64);
  }
  template <int T>
  static void zero() {
    __builtin_memset(tile(T), 0, sizeof(Tile));
  }
  template <int C, int A, int B>
  static void multiply_add() {
    using V = Vec<float, kMatrixSide>;
    using U = Vec<uint32_t, kMatrixSide>;
    const Tile &a = tile(A), &b = tile(B);
    Tile& c = tile(C);
    for (int i = 0; i < kMatrixSide; ++i) {
      V sum = nsk::NSK_ISA::load<V>(c[i]);
      for (int k = 0; k < kMatrixSide; ++k) {
        const U pairs = nsk::NSK_ISA::load<U>(b[k]);
        sum += bit_cast<float>(a[i][k] << 16) * (V)(pairs << 16);
        sum += bit_cast<float>(a[i][k] & 0xffff0000u) * (V)(pairs & 0xffff0000u);
      }
      nsk::NSK_ISA::store(c[i], sum);
    }
  }

 private:
  using Tile = uint32_t[kMatrixSide][kMatrixSide];
  static bool& in_use() {
    static thread_local bool configured = false;
    return configured;
  }
  static Tile& tile(int t) {
    static thread_local Tile tiles[8];
    if (!in_use()) __builtin_trap();  // as the processor does
    return tiles[t];
  }
};

#else

inline constexpr bool kHasMatrixUnit = false;

// Names for code that is never made.
class MatrixUnit {
 public:
  template <int T>
  static void load(const void* from, ptrdiff_t stride);
  template <int T>
  static void store(void* to, ptrdiff_t stride);
  template <int T>
  static void zero();
  template <int C, int A, int B>
  static void multiply_add();
};

#endif

}  // namespace nsk::NSK_ISA
