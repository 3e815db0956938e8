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

// A tensor of T or of float; elements are counted in its own type.
template <class T>
struct TensorOfEither {
  Global<const unsigned char> data;
  bool is_float;

  __device__ __forceinline__ explicit operator bool() const { return bool(data); }
  __device__ __forceinline__ float operator[](int64_t i) const {
    if (is_float) return as<const float>(data)[i];
    const uint16_t bits = as<const uint16_t>(data)[i];
    return unpack<T>(bits).x;
  }
};

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

  // Packed sequences, or null. batch is their number, seqlen_* are rows of all, and batch strides are 0. Offsets that are
  // not in order or beyond the rows are clamped.
  Global<const int32_t> cu_seqlens_q, cu_seqlens_k;

  int window_left, window_right;  // -1: unbounded
  bool is_causal, bottom_right;
  float scale, softcap;

  int row_tiles;  // tiles of rows in the grid, for each head and batch; longer sequences are gone through in turns
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

}  // namespace nsk::cuda
