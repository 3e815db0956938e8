// What products of residual MLPs multiply: numbers of 16 bits, or floats that are rounded to TF32.
//
// mma takes 32 bytes of a row of either operand, whichever the type: of TF32 half as many numbers of twice the size,
// each where ldmatrix puts the word. Only what has to be transposed differs, as ldmatrix transposes 16 bits.
//
// Shared memory is cut into pieces of 16 bytes. Those of a row are permuted, by an exclusive or with a number that
// depends on the row, so that what a warp reads or writes at a time lies in different banks.
#pragma once

#include "residual_mlp_problem.cuh"

namespace nsk::cuda {

// Operands whose k runs down the rows: matrices of kRows rows, as long as eight numbers, kPieces pieces. A lane's word
// is of column lane / 4, and of rows 2 (lane % 4) and the next, or row lane % 4.
template <class T>
struct Transposed {
  static constexpr int kPieces = int(sizeof(T)) / 2, kRows = 8 / kPieces;

  // Four matrices: at(i, row, piece) is where a piece of the i-th lies.
  template <class F>
  __device__ __forceinline__ static void load(uint32_t (&fragments)[4], int lane, const F& at) {
    if constexpr (sizeof(T) == 2) {
      ldmatrix<true>(fragments, at(lane / 8, lane % 8, 0));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        fragments[i] = *as<const uint32_t>(at(i, lane % 4, lane / 16) + lane / 4 % 4 * 4);
    }
  }
};

// Rows of kOfRow pieces, of which kTogether neighbours are read of one row at a time: 8 / kOfRow rows span all banks,
// and so many are permuted alike.
template <int kOfRow, int kTogether = 1>
__device__ __forceinline__ int swizzled(int row, int piece) {
  constexpr int kPermuted = kOfRow < 8 ? kOfRow : 8;
  return (row * kOfRow + (piece ^ (row / (8 / kPermuted) % (kPermuted / kTogether) * kTogether))) * 16;
}

// Rows of 8 pieces or more that are written two pieces of four rows at a time if T is of 32 bits, beside ldmatrix's one
// of eight: the bits of row % 8 are rotated.
template <class T>
__device__ __forceinline__ int permutation(int row) {
  return sizeof(T) == 2 ? row % 8 : row % 4 * 2 + row / 4 % 2;
}

}  // namespace nsk::cuda
