// What the kernels of gated attention are given, and which part of it one block works on.
#pragma once

#include "../common/mask.h"
#include "device.cuh"

namespace nsk::cuda {

struct Strides {  // in elements; 0 where the tensor does not have the dimension or broadcasts over it
  int64_t batch, head, row;

  __device__ __forceinline__ int64_t at(int b, int h, int64_t r) const { return b * batch + h * head + r * row; }
};

enum class Gate { none, elementwise, headwise };
enum class Mask { none, boolean, floating };

// One number of T.
template <class T>
__device__ __forceinline__ float load_one(Global<const T> from) {
  if constexpr (sizeof(T) == 4) {
    return as<const float>(from)[0];
  } else {
    const uint16_t bits = as<const uint16_t>(from)[0];
    return unpack<T>(bits).x;
  }
}
template <class T>
__device__ __forceinline__ void store_one(Global<T> to, float x) {
  if constexpr (sizeof(T) == 4)
    as<float>(to)[0] = x;
  else
    as<uint16_t>(to)[0] = uint16_t(pack<T>(x, 0));
}

// A tensor of T or, where T is a half type, of float; elements are counted in its own type.
template <class T>
struct TensorOfEither {
  Global<const unsigned char> data;
  bool is_float;

  __device__ __forceinline__ explicit operator bool() const { return bool(data); }
  __device__ __forceinline__ float operator[](int64_t i) const {
    if (is_float) return as<const float>(data)[i];
    return load_one(as<const T>(data) + i);
  }
};

template <class T>
__device__ __forceinline__ void store_either(Global<unsigned char> to, int64_t i, bool is_float, float x) {
  if (is_float)
    as<float>(to)[i] = x;
  else
    store_one(as<T>(to) + i, x);
}

// As nsk_gated_sdpa in nsk.h. Lengths add up to less than 2^31. query, key, value, out and an elementwise gate have
// unit column strides; their rows begin at multiples of 16 bytes, only an elementwise gate of float may begin anywhere.
template <class T>
struct GatedSdpa {
  int batch, heads_q, heads_kv, seqlen_q, seqlen_k;
  Global<const T> query, key, value;
  Strides query_stride, key_stride, value_stride;

  TensorOfEither<T> gate;
  Strides gate_stride;
  Gate gate_kind;

  TensorOfEither<T> mask;  // or bytes, 0 for a key that is not seen
  Strides mask_stride;
  int64_t mask_stride_key;

  TensorOfEither<T> sink;
  int64_t sink_stride;

  Global<T> out;
  Strides out_stride;
  Global<float> lse;  // may be absent
  Strides lse_stride;

  // Packed sequences, or null. batch is their number, seqlen_* are rows of all, and batch strides are 0. Offsets that
  // are not in order or beyond the rows are clamped.
  Global<const int32_t> cu_seqlens_q, cu_seqlens_k;

  int window_left, window_right;  // -1: unbounded
  bool is_causal, bottom_right;
  float scale, softcap;
};

// One sequence: the first of its rows, and how many there are.
struct Rows {
  int64_t first;
  int count;
};

__device__ __forceinline__ Rows rows_of(Global<const int32_t> cu_seqlens, int sequence, int rows) {
  if (!cu_seqlens) return {0, rows};
  const int begin = cu_seqlens[sequence], end = cu_seqlens[sequence + 1];
  const int first = min(max(begin, 0), rows);
  return {first, min(max(end, first), rows) - first};
}

// What one block works on: the rows of a head of a sequence from `row` on, which may be past its end.
struct RowTile {
  int batch, head, row;
};

// Of packed sequences, nobody on the host knows the lengths. But sequence n, of the rows c[n] .. c[n + 1], has no more
// tiles than f(n + 1) - f(n) with f(n) = c[n] / kRows + n, all have f(N) = rows / kRows + N, and a search finds whose a
// place among these is.
template <int kRows, class T>
__host__ __device__ inline int row_tiles(const GatedSdpa<T>& p) {
  return p.cu_seqlens_q ? p.seqlen_q / kRows + p.batch : (p.seqlen_q + kRows - 1) / kRows;
}

// Blocks in the grid.
template <int kRows, class T>
__host__ __device__ inline int64_t gated_sdpa_blocks(const GatedSdpa<T>& p) {
  return int64_t(row_tiles<kRows>(p)) * p.heads_q * (p.cu_seqlens_q ? 1 : p.batch);
}

// Whose tile is at a place among those of packed sequences of `rows` rows in all, and where in its sequence it begins.
template <int kRows>
__device__ __forceinline__ RowTile packed_tile(Global<const int32_t> cu_seqlens, int sequences, int rows, int head,
                                               int place) {
  const auto before = [&](int sequence) {
    const int c = cu_seqlens[sequence];
    return min(max(c, 0), rows) / kRows + sequence;
  };
  int first = 0, last = sequences - 1;  // of the sequences that it may be
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (before(middle) <= place)
      first = middle;
    else
      last = middle - 1;
  }
  // With offsets out of order it may be anything; then there is nothing to do.
  const int tile = place - before(first);
  return {first, head, tile < 0 ? rows : tile * kRows};
}

// Neighbouring blocks are of one head and share its keys; the last rows, which see most keys under a causal mask, come
// first.
template <int kRows, class T>
__device__ __forceinline__ RowTile row_tile(const GatedSdpa<T>& p) {
  const int tiles = row_tiles<kRows>(p), of = int(blockIdx.x) / tiles;
  const int place = tiles - 1 - int(blockIdx.x) % tiles;
  if (!p.cu_seqlens_q) return {of / p.heads_q, of % p.heads_q, place * kRows};
  return packed_tile<kRows>(p.cu_seqlens_q, p.batch, p.seqlen_q, of, place);
}

}  // namespace nsk::cuda
