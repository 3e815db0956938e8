// Starts the launches of the backward that do not depend on head dimensions.
#include "gated_sdpa_launch.cuh"
#include "gated_sdpa_rows.cuh"
#include "gated_sdpa_sink.cuh"

namespace nsk::cuda {

template <class T>
int64_t sink_parts(const GatedSdpa<T>& p) {
  return gated_sdpa_sink_parts(p);
}

template <class T>
nsk_status start_rows(const GatedSdpaBackward<T>& p, int columns, const Launcher& launcher) {
  using Rows = GatedSdpaRows<T>;
  const int64_t blocks = gated_sdpa_blocks<Rows::kRows>(p.forward);
  return launcher.start<gated_sdpa_rows<T>>("gated_sdpa_rows", {blocks}, Rows::kThreads, 0, p, columns);
}

template <class T>
nsk_status start_sink(const GatedSdpaBackward<T>& p, const nsk_view& gradient, const Launcher& launcher) {
  const GatedSdpaSink args{p.sink_parts, gated_sdpa_sink_parts(p.forward),
                           Global<unsigned char>(static_cast<unsigned char*>(gradient.data)), gradient.stride[1],
                           gradient.dtype == NSK_F32};
  return launcher.start<gated_sdpa_sink<T>>("gated_sdpa_sink", {p.forward.heads_q}, GatedSdpaSink::kThreads, 0, args);
}

template int64_t sink_parts<bf16>(const GatedSdpa<bf16>&);
template int64_t sink_parts<f16>(const GatedSdpa<f16>&);
template int64_t sink_parts<tf32>(const GatedSdpa<tf32>&);
template nsk_status start_rows<bf16>(const GatedSdpaBackward<bf16>&, int, const Launcher&);
template nsk_status start_rows<f16>(const GatedSdpaBackward<f16>&, int, const Launcher&);
template nsk_status start_rows<tf32>(const GatedSdpaBackward<tf32>&, int, const Launcher&);
template nsk_status start_sink<bf16>(const GatedSdpaBackward<bf16>&, const nsk_view&, const Launcher&);
template nsk_status start_sink<f16>(const GatedSdpaBackward<f16>&, const nsk_view&, const Launcher&);
template nsk_status start_sink<tf32>(const GatedSdpaBackward<tf32>&, const nsk_view&, const Launcher&);

}  // namespace nsk::cuda
