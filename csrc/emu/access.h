// Loads, stores and atomics of kernels: each is checked, counted and entered into shadow memory before it is done.
#pragma once

#include <cstddef>
#include <cstdint>

#include "clocks.h"

namespace nsk::emu {

enum class Space { global, shared };

// An access of the running thread.
void access(Space space, const void* p, size_t bytes, size_t align, Access access);

// What the running thread has begun to read from global memory it reads until now, as a cp.async does until the wait.
void read_until_now(const void* p, size_t bytes);

// A row of ldmatrix or stmatrix: 16 bytes of shared memory. Each of its four words is read or written by some lanes of
// the running thread's warp.
void access_row(const void* p, const uint32_t (&lanes)[4], Access access);

}  // namespace nsk::emu
