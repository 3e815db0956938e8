// Raw pointers in, status out. A tensor arrives as (data pointer, dtype, strides of [batch, head, row, column]), or
// None; nsk.backends makes them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../include/nsk.h"

namespace nsk::bind {

using Tensor = std::optional<std::tuple<uintptr_t, int32_t, std::array<int64_t, 4>>>;

inline nsk_view view(const Tensor& tensor) {
  nsk_view v{};
  if (tensor) {
    v.data = reinterpret_cast<void*>(std::get<0>(*tensor));
    v.dtype = std::get<1>(*tensor);
    const auto& stride = std::get<2>(*tensor);
    std::copy(stride.begin(), stride.end(), v.stride);
  }
  return v;
}

// What forward and backward take alike.
struct Problem {
  std::array<int64_t, 7> sizes;  // batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v
  std::array<Tensor, 8> tensors; // query, key, value, gate, mask, sink, out, lse
  std::array<uintptr_t, 2> cu_seqlens;
  std::array<int64_t, 6> options;  // window_left, window_right, is_causal, bottom_right, gate_kind, threads
  std::array<double, 2> scale;     // scale, softcap

  nsk_gated_sdpa args() const {
    nsk_gated_sdpa a{};
    a.batch = sizes[0];
    a.heads_q = sizes[1];
    a.heads_kv = sizes[2];
    a.seqlen_q = sizes[3];
    a.seqlen_k = sizes[4];
    a.head_dim = sizes[5];
    a.head_dim_v = sizes[6];
    nsk_view* const views[] = {&a.query, &a.key, &a.value, &a.gate, &a.mask, &a.sink, &a.out, &a.lse};
    for (size_t i = 0; i < tensors.size(); ++i) *views[i] = view(tensors[i]);
    a.cu_seqlens_q = reinterpret_cast<const int32_t*>(cu_seqlens[0]);
    a.cu_seqlens_k = reinterpret_cast<const int32_t*>(cu_seqlens[1]);
    a.window_left = options[0];
    a.window_right = options[1];
    a.is_causal = int32_t(options[2]);
    a.bottom_right = int32_t(options[3]);
    a.gate_kind = int32_t(options[4]);
    a.threads = int32_t(options[5]);
    a.scale = scale[0];
    a.softcap = scale[1];
    return a;
  }
};

// Of grad_out, grad_lse, then the gradients of query, key, value, gate, mask, sink.
using Gradients = std::array<Tensor, 8>;

inline nsk_gated_sdpa_backward backward_args(const Problem& problem, const Gradients& gradients,
                                             const std::array<int64_t, 4>& mask_size) {
  nsk_gated_sdpa_backward args{};
  args.forward = problem.args();
  nsk_view* const views[] = {&args.grad_out,   &args.grad_lse,  &args.grad_query, &args.grad_key,
                             &args.grad_value, &args.grad_gate, &args.grad_mask,  &args.grad_sink};
  for (size_t i = 0; i < gradients.size(); ++i) *views[i] = view(gradients[i]);
  std::copy(mask_size.begin(), mask_size.end(), args.mask_size);
  return args;
}

using MlpSizes = std::array<int64_t, 5>;    // groups, rows, width, depth, layers_per_block
using MlpTensors = std::array<Tensor, 9>;   // x, weight, bias, ln_weight, ln_bias, y, stream, normalised, rstd
using MlpOptions = std::array<int32_t, 2>;  // activation, threads

inline nsk_residual_mlp mlp_args(const MlpSizes& sizes, const MlpTensors& tensors, const MlpOptions& options, double eps) {
  nsk_residual_mlp a{};
  a.groups = sizes[0];
  a.rows = sizes[1];
  a.width = sizes[2];
  a.depth = sizes[3];
  a.layers_per_block = sizes[4];
  nsk_view* const views[] = {&a.x, &a.weight, &a.bias,       &a.ln_weight, &a.ln_bias,
                             &a.y, &a.stream, &a.normalised, &a.rstd};
  for (size_t i = 0; i < tensors.size(); ++i) *views[i] = view(tensors[i]);
  a.activation = options[0];
  a.threads = options[1];
  a.eps = eps;
  return a;
}

// Of y, then the gradients of x, weight, bias, ln_weight, ln_bias.
using MlpGradients = std::array<Tensor, 6>;

inline nsk_residual_mlp_backward mlp_backward_args(const nsk_residual_mlp& forward, const MlpGradients& gradients) {
  nsk_residual_mlp_backward args{};
  args.forward = forward;
  nsk_view* const views[] = {&args.grad_y,    &args.grad_x,         &args.grad_weight,
                             &args.grad_bias, &args.grad_ln_weight, &args.grad_ln_bias};
  for (size_t i = 0; i < gradients.size(); ++i) *views[i] = view(gradients[i]);
  return args;
}

}  // namespace nsk::bind
