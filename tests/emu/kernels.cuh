// Small kernels that use one means of synchronisation each.
#pragma once

#include "../../csrc/cuda/device.cuh"

namespace nsk::test {

using namespace nsk::cuda;

// Every thread takes elements a whole grid apart, four at a time where there are four.
__global__ void vector_add(int count, Global<const float> x, Global<const float> y, Global<float> sum) {
  const int step = int(gridDim.x * blockDim.x);
  int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  for (; i < count / 4; i += step) {
    const float4 a = as<const float4>(x)[i], b = as<const float4>(y)[i];
    as<float4>(sum)[i] = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  }
  for (i += count / 4 * 3; i < count; i += step) sum[i] = x[i] + y[i];
}

// sums[row] = sum of x[row, :]: shuffles within warps, shared memory among them. One block takes all rows, so that the
// partial sums of one row must have been read before those of the next are written.
__global__ void row_sums(int rows, int columns, Global<const float> x, Global<float> sums) {
  NSK_SHARED_ARRAY(float, partial, 32);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  for (int row = 0; row < rows; ++row) {
    float sum = 0;
    for (int i = int(threadIdx.x); i < columns; i += int(blockDim.x)) sum += x[row * columns + i];
    for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    if (warp == 0) {
      sum = 0;
      if (lane < warps) sum = partial[lane];
      for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(0xffffffffu, sum, delta);
      if (lane == 0) sums[row] = sum;
    }
    __syncthreads();
  }
}

// Each warp turns rows of 32 round, through shared memory of its own: only __syncwarp is needed, before the row is read
// and before it is overwritten.
__global__ void reverse_rows(int rows, Global<const float> x, Global<float> y) {
  NSK_DYNAMIC_SHARED(bytes);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  const Shared<float> row = as<float>(bytes) + warp * 32;
  for (int r = warp; r < rows; r += warps) {
    row[lane] = x[r * 32 + lane];
    __syncwarp();
    y[r * 32 + lane] = row[31 - lane];
    __syncwarp();
  }
}

// Half of the warps load tiles, the others sum them up: two stages, and for each a barrier that says it is full and one
// that says it is empty. Loaders arrive at `full` and wait at `empty`; the others do it the other way round.
__global__ void pipelined_sums(int tiles, Global<const float> x, Global<float> sums) {
  NSK_DYNAMIC_SHARED(bytes);
  const int half = int(blockDim.x) / 2, thread = int(threadIdx.x) % half;
  const Shared<float> stages = as<float>(bytes);  // [2][half]
  const int full = 1, empty = 3;
  if (int(threadIdx.x) < half) {
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile >= 2) barrier_sync(empty + tile % 2, 2 * half);
      stages[tile % 2 * half + thread] = x[tile * half + thread];
      barrier_arrive(full + tile % 2, 2 * half);
    }
  } else {
    float sum = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      barrier_sync(full + tile % 2, 2 * half);
      for (int i = 0; i < half; ++i) sum += stages[tile % 2 * half + (thread + i) % half] * float(i + 1);
      if (tile + 2 < tiles) barrier_arrive(empty + tile % 2, 2 * half);
    }
    sums[thread] = sum;
  }
}

// The sum of all of x in one launch: the last block to be done adds up what all have found, in the order of the blocks.
// Only the fences order one block's partial sum before its reading by another.
__global__ void sum_of_all(int count, Global<const float> x, Global<float> partial, Global<unsigned> done,
                           Global<float> sum) {
  NSK_SHARED_ARRAY(float, sums, 32);
  NSK_SHARED_ARRAY(unsigned, ticket, 1);
  float mine = 0;
  for (int i = int(blockIdx.x * 32 + threadIdx.x); i < count; i += int(gridDim.x * 32)) mine += x[i];
  sums[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int i = 0; i < 32; ++i) total += sums[i];
    partial[blockIdx.x] = total;
    __threadfence();
    ticket[0] = atomicAdd(done, 1u);
    __threadfence();
  }
  __syncthreads();
  if (ticket[0] == gridDim.x - 1 && threadIdx.x == 1) {
    float total = 0;
    for (int i = 0; i < int(gridDim.x); ++i) total += partial[i];
    *sum = total;
  }
}

}  // namespace nsk::test
