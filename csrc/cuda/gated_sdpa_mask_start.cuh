// Starts what a floating mask takes besides, of one pair of head dimensions: the rows' norms, and its gradient.
#pragma once

#include "gated_sdpa_launch.cuh"
#include "gated_sdpa_mask_grad.cuh"
#include "gated_sdpa_norm.cuh"

namespace nsk::cuda {

template <class T, class Dims>
nsk_status start_norm(const GatedSdpaBackward<T>& p, const Launcher& launcher) {
  using Tiles = GatedSdpaNormTiles<T, Dims::kD>;
  const auto with = [&]<bool kSoftcap>() {
    return launcher.start<gated_sdpa_norm<T, Dims::kD, kSoftcap>>(
        "gated_sdpa_norm", {gated_sdpa_blocks<Tiles::kRows>(p.forward)}, Tiles::kThreads, Tiles::kSharedBytes, p);
  };
  return p.forward.softcap > 0 ? with.template operator()<true>() : with.template operator()<false>();
}

template <class T, class Dims>
nsk_status start_mask_grad(const GatedSdpaBackward<T>& p, const Launcher& launcher) {
  using Tiles = GatedSdpaMaskGradTiles<T, Dims::kD, Dims::kDv>;
  const int64_t blocks = mask_grad_blocks<Tiles>(p);
  if (blocks == 0) return NSK_OK;
  const auto with = [&]<bool kSoftcap>() {
    return launcher.start<gated_sdpa_mask_grad<T, Dims::kD, Dims::kDv, kSoftcap>>(
        "gated_sdpa_mask_grad", {blocks}, Tiles::kThreads, Tiles::kSharedBytes, p);
  };
  return p.forward.softcap > 0 ? with.template operator()<true>() : with.template operator()<false>();
}

}  // namespace nsk::cuda
