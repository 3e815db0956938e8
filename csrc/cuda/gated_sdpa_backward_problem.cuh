// What the kernels of gated attention's backward are given. With P the probabilities among the keys that a row sees,
// share = sigmoid(lse - sink) the keys' part of the denominator (1 without a sink) and dO = dOut * sigmoid(gate):
//
//   delta = rowsum(dOut * out)        dGate = dOut * out * (1 - sigmoid(gate)), headwise (1 - sigmoid(gate)) * delta
//   dV = P^T (share dO)               dS = P * (share dO v^T - (share delta - dLse))
//   dQ = scale dS k                   dK = scale dS^T q          dMask = dS          dSink = -sum_i (1 - share_i) delta_i
//
// The first launch goes through the rows of the queries and leaves, per row, share dO rounded to T and the two numbers
// norm and change = share delta - dLse; none of the others sees gate, sink or what came in as gradients. Under a
// floating mask a launch before it finds each row's norm in two parts, as a mask may lift scores so far that one float
// does not hold lse well enough: P = exp2(s - norm - low).
#pragma once

#include "gated_sdpa_problem.cuh"

namespace nsk::cuda {

// Whether the sums of both dK and dV fit into the registers of one launch. Where they do, both are always computed.
template <class T, int kD, int kDv>
inline constexpr bool kKeyAndValueFit = kD + kDv <= (sizeof(T) == 2 ? 320 : 256);

// `forward` has the out and lse of the forward. A gradient that is absent is not wanted. Gradients of query, key and
// value have unit column strides and rows that begin at multiples of 16 bytes; incoming gradients have any strides.
template <class T>
struct GatedSdpaBackward {
  GatedSdpa<T> forward;

  Global<const T> grad_out;
  Strides grad_out_stride;
  int64_t grad_out_stride_column;
  Global<const float> grad_lse;  // may be absent
  Strides grad_lse_stride;

  // Left by the first launches for the later ones: dense, [batch, head, row, Dv] and [batch, head, row]; of packed
  // sequences [head, row, Dv] and [head, row].
  Global<T> scaled;        // share dO; 0 in a row that sees nothing
  Global<float> norm;      // log2(e) lse, or the largest score in these units; +inf in a row that sees nothing
  Global<float> norm_low;  // under a floating mask: log2 of the sum of exp2(s - norm); else absent
  Global<float> change;    // share delta - dLse; 0 in a row that sees nothing

  Global<T> grad_query, grad_key, grad_value;
  Strides grad_query_stride, grad_key_stride, grad_value_stride;
  Global<unsigned char> grad_gate;  // in the gate's type: T or float
  Strides grad_gate_stride;         // unit column stride
  Global<float> sink_parts;         // [head, tiles of rows of all of its batch]: summed by the caller, in this order
  Global<unsigned char> grad_mask;  // dense, in the mask's type and at its own shape
  int64_t mask_size[4];

  // Where the numbers of a head's rows begin in what the launches leave for each other.
  __device__ __forceinline__ int64_t row_at(int batch, int head, const Rows& rows) const {
    const int64_t heads = int64_t(forward.cu_seqlens_q ? 0 : batch) * forward.heads_q + head;
    return heads * forward.seqlen_q + rows.first;
  }
};

}  // namespace nsk::cuda
