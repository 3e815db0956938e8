// The row-wise launch of gated attention's backward: what each row of the queries contributes before any product. With
// open = sigmoid(gate), 1 without a gate, and share = sigmoid(lse - sink), 1 without a sink, in every row
//
//   scaled = share open dOut                       rounded to T
//   delta  = sum (dOut out)                        over the columns; of dOut what scaled / (share open) gives back
//   norm   = log2(e) lse                           unless the launch before has written it, and norm_low
//   change = share delta - dLse
//   dGate  = dOut out (1 - open)                   headwise delta (1 - open)
//   dSink  = - sum ((1 - share) delta)             over the rows: here those of one block
//
// The products see `scaled` as it is rounded. Unless delta sees the same rounding, P (scaled v^T - change) does not sum
// to 0 over the keys any more. A row that sees nothing has lse = -inf and leaves 0 and a norm of +inf, whatever else it
// holds.
//
// A block of four warps has 32 rows of one head, each warp 8 of them; 8, 16 or 32 lanes, as many as a row needs, take
// the row's pieces of eight columns, one each, and so 4, 2 or 1 rows are done side by side. Everything is read once.
// Rows that no sequence covers are left alone. Sums are always added up in the same order, shuffles first, then the
// warps; a block without rows leaves a part of 0.
#pragma once

#include "gated_sdpa_backward_problem.cuh"
#include "online_softmax.cuh"

namespace nsk::cuda {

template <class T>
struct GatedSdpaRows {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 32;
  static constexpr int kMaxColumns = 256;

  const GatedSdpaBackward<T>& p;
  const GatedSdpa<T>& f;
  const int columns;  // of values: a multiple of 8
  const int lane, batch, head;
  const Rows queries;
  const int64_t dense;  // where the head's rows begin in what the launches leave for each other

  __device__ __forceinline__ GatedSdpaRows(const GatedSdpaBackward<T>& problem, int columns, const RowTile& tile)
      : p(problem),
        f(problem.forward),
        columns(columns),
        lane(int(threadIdx.x) % 32),
        batch(tile.batch),
        head(tile.head),
        queries(rows_of(problem.forward.cu_seqlens_q, tile.batch, problem.forward.seqlen_q)),
        dense(problem.row_at(tile.batch, tile.head, queries)) {}

  // Of the rows from block_row on: the lane's part of the sum of (1 - share) delta.
  __device__ __forceinline__ float run(int block_row) const {
    const int width = columns <= 64 ? 8 : columns <= 128 ? 16 : 32;
    const int first = block_row + int(threadIdx.x) / 32 * (kRows / kWarps);
    float lost = 0;
    for (int i = 0; i < kRows / kWarps; i += 32 / width) lost += one(first + i + lane / width, width);
    return lost;
  }

  // One row, or what of it is this lane's. The lanes of rows beyond the last come along for the shuffles.
  __device__ __forceinline__ float one(int row, int width) const {
    const bool inside = row < queries.count, leader = lane % width == 0;
    const int column = lane % width * 8;
    const int64_t at = queries.first + row;
    bool alive = false;
    float norm = 0, share = 1, lost_share = 0, open = 1, closed = 0;
    if (inside) {
      float low = 0;
      if (p.norm_low) {
        norm = p.norm[dense + row], low = p.norm_low[dense + row];
        alive = norm != -minus_infinity() || low != low;  // NaN: it sees a score of infinity
      } else {
        const float lse = f.lse[f.lse_stride.at(batch, head, at)];
        alive = lse != minus_infinity();
        norm = alive ? lse * kLog2e : -minus_infinity();
      }
      if (f.sink && alive) {
        const float sink = f.sink[head * f.sink_stride], gap = norm - sink * kLog2e + low;
        share = sigmoid2(gap), lost_share = sigmoid2(-gap);
      }
      if (f.gate_kind == Gate::headwise && alive) {
        const float gate = f.gate[f.gate_stride.at(batch, head, at)];
        open = sigmoid2(gate * kLog2e), closed = sigmoid2(-gate * kLog2e);
      }
    }

    float total = 0;
    if (inside && column < columns) {
      float scaled[8] = {};
      if (alive) total = eight(scaled, at, column, share, open);
      if (!alive && f.gate_kind == Gate::elementwise && p.grad_gate) store_grad_gate(at, column, scaled);
      store_eight(p.scaled + ((dense + row) * columns + column), scaled);
    }
    for (int distance = width / 2; distance > 0; distance /= 2)
      total += __shfl_xor_sync(0xffffffffu, total, distance);

    if (!inside || !leader) return 0;
    if (!p.norm_low) p.norm[dense + row] = norm;
    if (f.gate_kind == Gate::headwise && p.grad_gate) {
      const int64_t to = p.grad_gate_stride.at(batch, head, at);
      const float grad = alive ? total * closed : 0.0f;
      store_either<T>(p.grad_gate, to, f.gate.is_float, grad);
    }
    float change = 0;
    if (alive) {
      change = share * total;
      if (p.grad_lse) {
        const float grad_lse = p.grad_lse[p.grad_lse_stride.at(batch, head, at)];
        change -= grad_lse;
      }
    }
    p.change[dense + row] = change;
    return alive ? lost_share * total : 0.0f;
  }

  // Eight columns of a row that sees something: their `scaled` and part of delta; writes what an elementwise gate gets.
  __device__ __forceinline__ float eight(float (&scaled)[8], int64_t at, int column, float share, float open) const {
    float dout[8], out[8], opens[8];
    const Global<const T> dout_row = p.grad_out + p.grad_out_stride.at(batch, head, at);
    load_eight(dout, dout_row + column * p.grad_out_stride_column, p.grad_out_stride_column);
    const Global<const T> out_row = f.out;
    load_eight(out, out_row + (f.out_stride.at(batch, head, at) + column));
#pragma unroll
    for (float& x : opens) x = open;
    if (f.gate_kind == Gate::elementwise) {
      float gate[8];
      const int64_t gate_at = f.gate_stride.at(batch, head, at) + column;
      if (f.gate.is_float)
        load_eight(gate, as<const float>(f.gate.data) + gate_at);
      else
        load_eight(gate, as<const T>(f.gate.data) + gate_at);
#pragma unroll
      for (int i = 0; i < 8; ++i) opens[i] = sigmoid2(gate[i] * kLog2e);
      if (p.grad_gate) {
        float grad[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) grad[i] = dout[i] * out[i] * sigmoid2(-gate[i] * kLog2e);
        store_grad_gate(at, column, grad);
      }
    }
    float total = 0;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float factor[2] = {opens[i] * share, opens[i + 1] * share};
      const float2 rounded = unpack_pair<T>(operand_pair<T>(dout[i] * factor[0], dout[i + 1] * factor[1]));
      scaled[i] = rounded.x, scaled[i + 1] = rounded.y;
      // Where next to nothing passes, there is nothing to divide by, and out is next to nothing too.
      total += out[i] * (factor[0] > 1e-30f ? rounded.x * rcp_approx(factor[0]) : dout[i]);
      total += out[i + 1] * (factor[1] > 1e-30f ? rounded.y * rcp_approx(factor[1]) : dout[i + 1]);
    }
    return total;
  }

  __device__ __forceinline__ void store_grad_gate(int64_t at, int column, const float (&grad)[8]) const {
    const int64_t to = p.grad_gate_stride.at(batch, head, at) + column;
    if (f.gate.is_float)
      store_eight(as<float>(p.grad_gate) + to, grad);
    else
      store_eight(as<T>(p.grad_gate) + to, grad);
  }

  // Tensors whose rows may begin anywhere go in pieces of 16 bytes only where they happen to.
  template <class U>
  __device__ static __forceinline__ bool in_pieces(Global<U> x) {
    const Global<const unsigned char> null = nullptr;
    return (as<const unsigned char>(x) - null) % 16 == 0;
  }
  __device__ static __forceinline__ void load_eight(float (&x)[8], Global<const T> from, int64_t stride = 1) {
    if (stride == 1 && in_pieces(from)) {
      constexpr int kOfPiece = 16 / int(sizeof(T));
#pragma unroll
      for (int piece = 0; piece < 8 / kOfPiece; ++piece) {
        const uint4 bits = as<const uint4>(from)[piece];
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < kOfPiece; i += 2) {
          Pair<T> pair;
          if constexpr (sizeof(T) == 2)
            pair = words[i / 2];
          else
            pair = {words[i], words[i + 1]};
          const float2 values = unpack_pair<T>(pair);
          x[piece * kOfPiece + i] = values.x, x[piece * kOfPiece + i + 1] = values.y;
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = load_one(from + i * stride);
  }
  __device__ static __forceinline__ void load_eight(float (&x)[8], Global<const float> from) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float value = from[i];
      x[i] = value;
    }
  }
  __device__ static __forceinline__ void store_eight(Global<T> to, const float (&x)[8]) {
    if (in_pieces(to)) {
      if constexpr (sizeof(T) == 2) {
        as<uint4>(to)[0] = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
      } else {
        as<float4>(to)[0] = {x[0], x[1], x[2], x[3]};
        as<float4>(to)[1] = {x[4], x[5], x[6], x[7]};
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) store_one(to + i, x[i]);
  }
  __device__ static __forceinline__ void store_eight(Global<float> to, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = x[i];
  }

  // Of x / log2(e).
  __device__ static __forceinline__ float sigmoid2(float x) { return rcp_approx(1.0f + exp2_approx(-x)); }
};

// Blocks of one head in the grid: as many parts has its sink's gradient.
template <class T>
__host__ __device__ inline int64_t gated_sdpa_sink_parts(const GatedSdpa<T>& p) {
  return int64_t(row_tiles<GatedSdpaRows<T>::kRows>(p)) * (p.cu_seqlens_q ? 1 : p.batch);
}

// A grid of gated_sdpa_blocks<GatedSdpaRows<T>::kRows>(...) blocks. `columns` is the values' head dimension.
template <class T>
__global__ void __launch_bounds__(GatedSdpaRows<T>::kThreads)
    gated_sdpa_rows(const __grid_constant__ GatedSdpaBackward<T> p, int columns) {
  using Kernel = GatedSdpaRows<T>;
  NSK_SHARED_ARRAY(float, of_warps, Kernel::kWarps);
  const RowTile tile = row_tile<Kernel::kRows>(p.forward);
  const Kernel block(p, columns, tile);
  float lost = tile.row < block.queries.count ? block.run(tile.row) : 0.0f;
  if (!p.sink_parts) return;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) lost += __shfl_xor_sync(0xffffffffu, lost, distance);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = lost;
  __syncthreads();
  if (threadIdx.x != 0) return;
  lost = 0;
#pragma unroll
  for (int warp = 0; warp < Kernel::kWarps; ++warp) lost += of_warps[warp];
  const int tiles = row_tiles<Kernel::kRows>(p.forward), of_batch = p.forward.cu_seqlens_q ? 0 : tile.batch;
  const int64_t part = int64_t(of_batch) * tiles + int(blockIdx.x) % tiles;
  p.sink_parts[tile.head * gated_sdpa_sink_parts(p.forward) + part] = -lost;
}

}  // namespace nsk::cuda
