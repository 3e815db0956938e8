// How the host starts a kernel: on a device's stream under nvcc, in the emulator under a host compiler. The code that
// chooses kernels, grids and shared memory is the same for both.
#pragma once

#include "../include/nsk.h"
#include "device.cuh"

namespace nsk::cuda {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// Whether a device takes so many blocks.
inline bool fits(const Grid& grid) { return grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535; }

inline void note(nsk_cuda_plan& plan, const char* kernel, const Grid& grid, int threads, int shared) {
  if (plan.count < plan.most) plan.launches[plan.count] = {kernel, {grid.x, grid.y, grid.z}, threads, shared};
  ++plan.count;
}

#if defined(__CUDACC__)

// What the last launch that failed on this thread was, and CUDA's word for it.
void remember_failure(const char* kernel, const Grid& grid, int threads, int shared, cudaError_t error);

struct Launcher {
  nsk_cuda_device device;

  template <auto kKernel, class... Args>
  nsk_status start(const char* name, const Grid& grid, int threads, int shared, const Args&... args) const {
    if (device.plan) return note(*device.plan, name, grid, threads, shared), NSK_OK;
    if (!fits(grid)) return NSK_BAD_ARGUMENT;
    cudaError_t error = cudaSuccess;
    if (shared > 48 * 1024)  // beyond this a kernel has to be allowed to, on each device; it costs next to nothing
      error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error == cudaSuccess) {
      kKernel<<<dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)), threads, shared,
                static_cast<cudaStream_t>(device.stream)>>>(args...);
      error = cudaGetLastError();
    }
    if (error == cudaSuccess) return NSK_OK;
    remember_failure(name, grid, threads, shared, error);
    return NSK_LAUNCH_FAILED;
  }
};

#else

struct Launcher {
  nsk_cuda_device device;
  emu::GlobalMemory& memory;
  emu::Options options;

  template <auto kKernel, class... Args>
  nsk_status start(const char* name, const Grid& grid, int threads, int shared, const Args&... args) const {
    if (device.plan) return note(*device.plan, name, grid, threads, shared), NSK_OK;
    if (!fits(grid)) return NSK_BAD_ARGUMENT;
    emu::launch({name, {unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)}, {unsigned(threads)}, size_t(shared)},
                memory, options, [&] { kKernel(args...); });
    return NSK_OK;
  }
};

#endif

// Room for what launches leave for each other, cut from one buffer: pieces begin at multiples of 256 bytes. Without a
// buffer it only counts.
class Scratch {
 public:
  explicit Scratch(void* buffer) : buffer_(static_cast<unsigned char*>(buffer)) {}

  template <class T>
  T* take(int64_t count) {
    T* const piece = buffer_ ? reinterpret_cast<T*>(buffer_ + bytes_) : nullptr;
    bytes_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* buffer_;
  int64_t bytes_ = 0;
};

}  // namespace nsk::cuda
