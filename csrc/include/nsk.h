/* The C ABI of the native core: read this page first.
 *
 * Every function takes one plain struct of pointers, strides and sizes and returns a status. The core owns no
 * tensor, knows no torch and keeps no state between calls but what this page names: the chosen instruction set,
 * and per-thread scratch that grows to the largest tile asked for.
 *
 * Callers guarantee that shapes, types and strides describe memory that they own (nsk.spec checks them);
 * the core checks what only it can see: the values inside cu_seqlens. */
#ifndef NSK_H
#define NSK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  NSK_OK = 0,
  NSK_OUT_OF_MEMORY = 1,
  NSK_BAD_ARGUMENT = 2,      /* a type or combination that no kernel takes */
  NSK_BAD_CU_SEQLENS_Q = 3,  /* not 0 = c[0] <= c[1] <= ... <= c[N] = total */
  NSK_BAD_CU_SEQLENS_K = 4,
  NSK_LAUNCH_FAILED = 5      /* nsk_cuda_failure() says what and why */
} nsk_status;

typedef enum { NSK_F32 = 0, NSK_F64 = 1, NSK_BF16 = 2, NSK_F16 = 3, NSK_BOOL = 4 } nsk_dtype;

/* A strided view. Dimensions are [batch, head, row, column] (row = position in the sequence); strides count elements.
 * data == NULL: absent. A dimension the tensor does not have, or broadcasts over, has stride 0. */
typedef struct {
  void* data;
  int64_t stride[4];
  int32_t dtype;
} nsk_view;

typedef enum { NSK_GATE_NONE = 0, NSK_GATE_ELEMENTWISE = 1, NSK_GATE_HEADWISE = 2 } nsk_gate;

/* Gated scaled-dot-product attention.
 *   s_ij = scale * q_i.k_j;  s = softcap * tanh(s / softcap) if softcap > 0;  s += mask if it is floating
 *   out_i = sigmoid(gate_i) * sum_j softmax_j(s_ij) v_j,   lse_i = log sum_j exp(s_ij)   over the allowed keys j
 * query, key, value, out and an elementwise gate have a unit column stride. */
typedef struct {
  int64_t batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
  nsk_view query, key, value;
  nsk_view gate;
  nsk_view mask; /* [batch, head, query, key]: NSK_BOOL or floating */
  nsk_view sink; /* stride[1] is its only stride */
  nsk_view out;
  nsk_view lse; /* float, or double for double inputs */
  /* Packed sequences: batch = number of sequences, seqlen_* = total rows, batch strides 0. NULL: dense. */
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  int64_t window_left, window_right; /* -1: unbounded */
  int32_t is_causal, bottom_right, gate_kind;
  double scale, softcap;
  int32_t threads;
} nsk_gated_sdpa;

/* The backward reads out and lse of the forward. A gradient whose data is NULL is not computed. */
typedef struct {
  nsk_gated_sdpa forward;
  nsk_view grad_out; /* unit column stride */
  nsk_view grad_lse; /* may be absent */
  nsk_view grad_query, grad_key, grad_value, grad_gate, grad_sink;
  nsk_view grad_mask;   /* at the mask's own shape: mask_size, dimensions it broadcasts over have size 1 */
  int64_t mask_size[4];
} nsk_gated_sdpa_backward;

nsk_status nsk_cpu_gated_sdpa_forward(const nsk_gated_sdpa* args);
nsk_status nsk_cpu_gated_sdpa_backward(const nsk_gated_sdpa_backward* args);

typedef enum { NSK_SILU = 0, NSK_RELU = 1, NSK_GELU_TANH = 2 } nsk_activation;

/* A stack of residual MLP blocks, `groups` of them side by side:
 *   h = x;  depth / layers_per_block times { t = h;  layers_per_block times t = act(LayerNorm(t W^T + b));  h += t };  y = h
 * Views are [group, layer, row, column] with a unit column stride: x and y have no layer, bias, ln_weight and ln_bias no
 * row; a weight's rows are dense (stride[2] == width).
 *
 * What a forward keeps for its backward is dense and laid out in strips of NSK_STRIP rows, S = ceil(rows / NSK_STRIP):
 * element (row, column) of a matrix [rows, width] stands at [row / NSK_STRIP][column][row % NSK_STRIP]. Lanes past the
 * last row repeat it. */
enum { NSK_STRIP = 16 };

typedef struct {
  int64_t groups, rows, width, depth, layers_per_block;
  nsk_view x, weight, bias, ln_weight, ln_bias;
  nsk_view y;
  nsk_view stream;     /* [group, block, strips]: the blocks' inputs, float (double for double weights) */
  nsk_view normalised; /* [group, layer, strips]: (z - mean) * rstd, in weight's type */
  nsk_view rstd;       /* [group, layer, S * NSK_STRIP]: float or double. These three may be absent. */
  double eps;
  int32_t activation;
  int32_t threads;
} nsk_residual_mlp;

/* The backward reads what the forward kept: normalised and rstd, or else stream, from which it computes them again, bit
 * for bit. The gradients of parameters need stream. A gradient whose data is NULL is not computed. */
typedef struct {
  nsk_residual_mlp forward; /* y is not read */
  nsk_view grad_y;
  nsk_view grad_x, grad_weight, grad_bias, grad_ln_weight, grad_ln_bias; /* as the inputs; dense but for grad_x */
} nsk_residual_mlp_backward;

nsk_status nsk_cpu_residual_mlp_forward(const nsk_residual_mlp* args);
nsk_status nsk_cpu_residual_mlp_backward(const nsk_residual_mlp_backward* args);

/* CUDA. Present where the library was built with NSK_CUDA. Kernels are queued on the stream and nothing waits for them:
 * what the host cannot see, the values in cu_seqlens, is clamped to the tensors. Pointers are the device's. Rows of
 * query, key, value, out, their gradients and an elementwise gate of query's type begin at multiples of 16 bytes; so do
 * a network's layers. */
typedef struct {
  const char* kernel;
  int64_t grid[3];         /* blocks */
  int32_t threads, shared; /* of a block; bytes of dynamic shared memory */
} nsk_cuda_launch;

/* The launches of a call, instead of the call: of `count` as many as `launches` has room for. */
typedef struct {
  nsk_cuda_launch* launches;
  int32_t most, count;
} nsk_cuda_plan;

typedef struct {
  void* stream;            /* a cudaStream_t */
  int32_t multiprocessors;
  int32_t shared_bytes;    /* that a block may have */
  nsk_cuda_plan* plan;     /* or NULL. If it is there, launches are noted in it and nothing runs: of pointers counts only
                              which are NULL, and there is no scratch */
} nsk_cuda_device;

/* Tensors of these head dimensions (two numbers a pair: of query and value) and of these widths have kernels, in
 * NSK_BF16, NSK_F16 and, multiplied as TF32, NSK_F32; a list ends with 0. */
const int32_t* nsk_cuda_head_dims(void);
const int32_t* nsk_cuda_widths(void);
/* Networks have them in NSK_F32 too, which is multiplied as TF32: calls are a user's leave to do so. Bytes of shared
 * memory that a block of theirs needs at least, by the weight's nsk_dtype. */
int32_t nsk_cuda_residual_mlp_shared(int32_t width, int32_t weight);
/* The architectures that the kernels were compiled for, e.g. "80,90". */
const char* nsk_cuda_architectures(void);
const char* nsk_cuda_failure(void);

/* `scratch` is as many bytes as the function before it says, at a multiple of 256. */
int64_t nsk_cuda_gated_sdpa_forward_scratch(const nsk_gated_sdpa* args, const nsk_cuda_device* device);
nsk_status nsk_cuda_gated_sdpa_forward(const nsk_gated_sdpa* args, const nsk_cuda_device* device, void* scratch);
int64_t nsk_cuda_gated_sdpa_backward_scratch(const nsk_gated_sdpa_backward* args, const nsk_cuda_device* device);
nsk_status nsk_cuda_gated_sdpa_backward(const nsk_gated_sdpa_backward* args, const nsk_cuda_device* device,
                                        void* scratch);

/* The kept stream is [group, block, row, width], dense but for its groups and blocks, whose strides are stride[0] and
 * stride[1]; normalised and rstd are not kept: the backward computes them again. Where there is no stream, the backward
 * runs the forward again. */
nsk_status nsk_cuda_residual_mlp_forward(const nsk_residual_mlp* args, const nsk_cuda_device* device);
int64_t nsk_cuda_residual_mlp_backward_scratch(const nsk_residual_mlp_backward* args, const nsk_cuda_device* device);
nsk_status nsk_cuda_residual_mlp_backward(const nsk_residual_mlp_backward* args, const nsk_cuda_device* device,
                                          void* scratch);

/* For memory that was just allocated and is about to be written: large pages where they fit, which the system hands out in
 * less time. A hint; contents stay. Nothing happens below a least size: there may be no aligned large page in it, and it
 * is likely to come from the heap, where it was touched before. */
enum { NSK_LEAST_FOR_LARGE_PAGES = 4 << 20 };
void nsk_use_large_pages(void* data, int64_t bytes);

/* Instruction sets built into this binary and usable on this processor, best first; NULL past the end. */
const char* nsk_cpu_isa_name(int index);
/* The one in use: the best, or what the environment variable NSK_CPU_ISA named when the first kernel ran. */
const char* nsk_cpu_isa(void);
/* Switches it for the whole process; returns 0 if this processor or binary lacks it. Not while kernels run. */
int nsk_cpu_set_isa(const char* name);
/* 1 if products of bf16 run on the processor's own bf16 dot instructions under the instruction set in use. */
int nsk_cpu_has_bf16_dot(void);

/* Roofs: the best of several register-only loops, in GFLOP/s (0 if the type has none of its own),
 * and of several read streams over `buffer`, in GB/s. */
double nsk_cpu_measure_fma(int32_t dtype, int32_t threads, double seconds);
double nsk_cpu_measure_read(const void* buffer, int64_t bytes, int32_t threads, double seconds);

#ifdef __cplusplus
}
#endif
#endif
