// Gated attention through the C ABI: type and head dimensions choose the kernel.
#include "gated_sdpa_launch.cuh"
#include "gated_sdpa_table.cuh"

namespace nsk::cuda {

template <class F>
nsk_status with_heads(const nsk_gated_sdpa& a, const F& f) {
  return BuiltHeadDims::find(a.head_dim, a.head_dim_v, [&]<class Dims>() {
    switch (a.query.dtype) {
      case NSK_BF16:
        return f.template operator()<bf16, Dims>();
      case NSK_F16:
        return f.template operator()<f16, Dims>();
      case NSK_F32:
        return f.template operator()<tf32, Dims>();
      default:
        return NSK_BAD_ARGUMENT;
    }
  });
}

// Into how many parts a decode splits the keys; 1: not at all, where the blocks of a plain forward keep the device busy
// or there are too many rows to read the keys again for every 16 of them.
int parts_of(const nsk_gated_sdpa& a, const nsk_cuda_device& device) {
  const int64_t rows = a.heads_q / a.heads_kv * a.seqlen_q;
  if (a.cu_seqlens_q || rows > 64) return 1;
  const int64_t blocks = a.batch * a.heads_kv * ((rows + 15) / 16), wanted = 2 * device.multiprocessors / blocks;
  const int64_t most = (a.seqlen_k + 255) / 256;
  return int(wanted < most ? wanted : most);
}

nsk_status gated_sdpa_forward(const nsk_gated_sdpa& a, const Launcher& launcher, Scratch& scratch, bool counts) {
  const int parts = parts_of(a, launcher.device);
  if (parts > 1 && counts) {
    const int64_t rows = parts * a.batch * a.heads_q * a.seqlen_q;
    scratch.take<float>(rows * a.head_dim_v), scratch.take<float>(rows), scratch.take<float>(rows);
  }
  if (counts) return NSK_OK;
  return with_heads(a, [&]<class T, class Dims>() {
    const GatedSdpa<T> p = problem_of<T>(a);
    return parts > 1 ? start_decode<T, Dims>(p, mask_of(a), parts, launcher, scratch)
                     : start_forward<T, Dims>(p, mask_of(a), launcher);
  });
}

template <class T, class Dims>
nsk_status backward(const nsk_gated_sdpa_backward& a, const Launcher& launcher, Scratch& scratch, bool counts) {
  const nsk_gated_sdpa& f = a.forward;
  const Mask mask = mask_of(f);
  GatedSdpaBackward<T> p{};
  p.forward = problem_of<T>(f);
  p.grad_out = pointer<const T>(a.grad_out), p.grad_out_stride = strides(a.grad_out);
  p.grad_out_stride_column = a.grad_out.stride[3];
  p.grad_lse = pointer<const float>(a.grad_lse), p.grad_lse_stride = strides(a.grad_lse);

  const int64_t rows = (f.cu_seqlens_q ? 1 : f.batch) * f.heads_q * f.seqlen_q;
  p.scaled = scratch.take<T>(rows * Dims::kDv);
  p.norm = scratch.take<float>(rows), p.change = scratch.take<float>(rows);
  if (mask == Mask::floating) p.norm_low = scratch.take<float>(rows);
  if (a.grad_sink.data) p.sink_parts = scratch.take<float>(f.heads_q * sink_parts<T>(p.forward));
  p.grad_query = pointer<T>(a.grad_query), p.grad_query_stride = strides(a.grad_query);
  p.grad_key = pointer<T>(a.grad_key), p.grad_key_stride = strides(a.grad_key);
  p.grad_value = pointer<T>(a.grad_value), p.grad_value_stride = strides(a.grad_value);
  // One launch computes both, and room is made for the one that nobody wants: kernels of their own for either would take
  // twice as long to compile.
  if (kKeyAndValueFit<T, Dims::kD, Dims::kDv> && bool(a.grad_key.data) != bool(a.grad_value.data)) {
    const int64_t columns = a.grad_key.data ? Dims::kDv : Dims::kD, head = f.seqlen_k * columns;
    T* const spare = scratch.take<T>((f.cu_seqlens_k ? 1 : f.batch) * f.heads_kv * head);
    (a.grad_key.data ? p.grad_value : p.grad_key) = Global<T>(spare);
    (a.grad_key.data ? p.grad_value_stride : p.grad_key_stride) = {f.cu_seqlens_k ? 0 : f.heads_kv * head, head, columns};
  }
  if (counts) return NSK_OK;
  p.grad_gate = pointer<unsigned char>(a.grad_gate), p.grad_gate_stride = strides(a.grad_gate);
  p.grad_mask = pointer<unsigned char>(a.grad_mask);
  for (int i = 0; i < 4; ++i) p.mask_size[i] = a.mask_size[i];

  nsk_status status = NSK_OK;
  const auto then = [&](bool wanted, const auto& start) {
    if (status == NSK_OK && wanted) status = start();
  };
  then(mask == Mask::floating, [&] { return start_norm<T, Dims>(p, launcher); });
  then(true, [&] { return start_rows(p, Dims::kDv, launcher); });
  then(a.grad_query.data, [&] { return start_dq<T, Dims>(p, mask, launcher); });
  then(a.grad_key.data || a.grad_value.data, [&] { return start_dkdv<T, Dims>(p, mask, launcher); });
  then(a.grad_mask.data, [&] { return start_mask_grad<T, Dims>(p, launcher); });
  then(a.grad_sink.data, [&] { return start_sink(p, a.grad_sink, launcher); });
  return status;
}

nsk_status gated_sdpa_backward(const nsk_gated_sdpa_backward& a, const Launcher& launcher, Scratch& scratch,
                               bool counts) {
  return with_heads(a.forward,
                    [&]<class T, class Dims>() { return backward<T, Dims>(a, launcher, scratch, counts); });
}

const int32_t* gated_sdpa_head_dims() { return kBuiltHeadDims; }

}  // namespace nsk::cuda
