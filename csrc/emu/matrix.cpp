#include "matrix.h"

#include <bit>
#include <cstring>

#include "../common/numeric.h"
#include "access.h"
#include "block.h"

namespace nsk::emu {
namespace {

struct Rows {
  Thread* thread;
  uint32_t* fragments;
  char* row;
};

// Element (row, column) of a matrix is the `half`-th of `lane`'s register.
struct Position {
  int lane, half;
};
Position position(int row, int column, bool transposed) {
  return transposed ? Position{column * 4 + row / 2, row % 2} : Position{row * 4 + column / 2, column % 2};
}

// A row of 16 bytes covers four of the 32 banks; the eight rows of a matrix take one pass if they cover each once.
void count_conflicts(const char* const (&rows)[8]) {
  int passes = 1;
  for (int bank = 0; bank < 8; ++bank) {
    int different = 0;
    for (int i = 0; i < 8; ++i) {
      bool counted = uintptr_t(rows[i]) / 16 % 8 != uintptr_t(bank);
      for (int j = 0; j < i && !counted; ++j) counted = rows[j] == rows[i];
      different += !counted;
    }
    if (different > passes) passes = different;
  }
  running->block->report.counts.bank_conflicts += passes - 1;
}

template <int kCount, bool kTransposed, bool kStore>
void move_matrices(uint32_t, void* const* operands) {
  Thread* const performing = running;
  for (int matrix = 0; matrix < kCount; ++matrix) {
    const char* rows[8];
    for (int row = 0; row < 8; ++row) {
      const Rows& source = *static_cast<const Rows*>(operands[matrix * 8 + row]);
      rows[row] = source.row;
      // Which lanes hold the row's words; the lane that gave the address takes part in the access as well.
      uint32_t lanes[4];
      for (int word = 0; word < 4; ++word)
        lanes[word] = 1u << position(row, 2 * word, kTransposed).lane |
                      1u << position(row, 2 * word + 1, kTransposed).lane | 1u << (matrix * 8 + row);
      running = source.thread;  // whom a fault is to name
      access_row(source.row, lanes, kStore ? Access::write : Access::read);
      uint16_t elements[8];
      if (!kStore) std::memcpy(elements, source.row, 16);
      for (int column = 0; column < 8; ++column) {
        const Position at = position(row, column, kTransposed);
        uint32_t& fragment = static_cast<const Rows*>(operands[at.lane])->fragments[matrix];
        if (kStore)
          elements[column] = uint16_t(fragment >> 16 * at.half);
        else
          fragment = (fragment & ~(0xffffu << 16 * at.half)) | uint32_t{elements[column]} << 16 * at.half;
      }
      if (kStore) std::memcpy(source.row, elements, 16);
    }
    running = performing;
    count_conflicts(rows);
  }
  Counts& counts = running->block->report.counts;
  ++(kStore ? counts.stmatrix : counts.ldmatrix);
}

template <bool kStore>
void move(uint32_t* fragments, int count, bool transposed, char* row, std::source_location where) {
  static constexpr Perform performs[2][3] = {
      {move_matrices<1, false, kStore>, move_matrices<2, false, kStore>, move_matrices<4, false, kStore>},
      {move_matrices<1, true, kStore>, move_matrices<2, true, kStore>, move_matrices<4, true, kStore>}};
  Rows rows{running, fragments, row};
  const Collective what{kStore ? "stmatrix" : "ldmatrix", uint32_t(count) | uint32_t(transposed) << 8, true};
  running->block->warps[running->warp].meet(*running, kAllLanes, what, &rows, performs[transposed][count / 2], where);
}

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

typedef float Row __attribute__((vector_size(32)));  // eight columns

template <Operand kType>
void load(uint32_t bits, float& low, float& high) {
  const uint16_t l = uint16_t(bits), h = uint16_t(bits >> 16);
  if (kType == Operand::bf16)
    low = to_float(bf16{l}), high = to_float(bf16{h});
  else
    low = to_float(f16{l}), high = to_float(f16{h});
}

// The lane that is the t-th of the g-th group of four holds, of a: rows g and g + 8; of b: column g; of d: both rows
// and columns 2 t and 2 t + 1. Products are exact in fp32 and added in the order of k, each sum rounded.
template <Operand kType>
void multiply_warp(uint32_t, void* const* operands) {
  constexpr int kDepth = kType == Operand::tf32 ? 8 : 16;
  float a[16][kDepth];
  Row b[kDepth];
  Row d[16];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = *static_cast<const Fragments*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i % 2);
      if constexpr (kType == Operand::tf32)
        a[row][t + 4 * (i / 2)] = std::bit_cast<float>(f.a[i] & 0xffffe000u);  // the hardware reads 19 bits
      else
        load<kType>(f.a[i], a[row][2 * t + 8 * (i / 2)], a[row][2 * t + 8 * (i / 2) + 1]);
      d[g + 8 * (i / 2)][2 * t + i % 2] = f.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      if constexpr (kType == Operand::tf32) {
        b[t + 4 * i][g] = std::bit_cast<float>(f.b[i] & 0xffffe000u);
      } else {
        float low, high;
        load<kType>(f.b[i], low, high);
        b[2 * t + 8 * i][g] = low, b[2 * t + 8 * i + 1][g] = high;
      }
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kDepth; ++k) d[row] += a[row][k] * b[k];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<const Fragments*>(operands[lane])->d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  Counts& counts = running->block->report.counts;
  ++counts.mma;
  counts.flops += 2 * 16 * 8 * kDepth;
}

}  // namespace

void load_matrix(uint32_t* fragments, int count, bool transposed, const void* row, std::source_location where) {
  move<false>(fragments, count, transposed, const_cast<char*>(static_cast<const char*>(row)), where);
}

void store_matrix(const uint32_t* fragments, int count, bool transposed, void* row, std::source_location where) {
  move<true>(const_cast<uint32_t*>(fragments), count, transposed, static_cast<char*>(row), where);
}

void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Operand type, std::source_location where) {
  static constexpr Perform performs[] = {multiply_warp<Operand::bf16>, multiply_warp<Operand::f16>,
                                         multiply_warp<Operand::tf32>};
  Fragments fragments{d, a, b};
  running->block->warps[running->warp].meet(*running, kAllLanes, {"mma", uint32_t(type), true}, &fragments,
                                            performs[int(type)], where);
}

}  // namespace nsk::emu
