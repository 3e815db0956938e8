// The warp's matrix instructions: ldmatrix, stmatrix and mma, with the fragment layouts of the PTX ISA.
#pragma once

#include <cstdint>
#include <source_location>

namespace nsk::emu {

// `count` 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i.
void load_matrix(uint32_t* fragments, int count, bool transposed, const void* row, std::source_location where);
void store_matrix(const uint32_t* fragments, int count, bool transposed, void* row, std::source_location where);

enum class Operand : uint32_t { bf16, f16, tf32 };

// d += a b with a of 16 x k, b of k x 8 and d of 16 x 8; k is 16, of tf32 8.
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Operand type, std::source_location where);

}  // namespace nsk::emu
