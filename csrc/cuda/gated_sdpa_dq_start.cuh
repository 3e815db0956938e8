// Starts dQ of one pair of head dimensions.
#pragma once

#include "gated_sdpa_dq.cuh"
#include "gated_sdpa_launch.cuh"

namespace nsk::cuda {

template <class T, class Dims>
nsk_status start_dq(const GatedSdpaBackward<T>& p, Mask mask, const Launcher& launcher) {
  using Tiles = GatedSdpaDqTiles<T, Dims::kD, Dims::kDv>;
  return with_scores_of(p.forward.softcap > 0, mask, [&]<bool kSoftcap, Mask kMask>() {
    return launcher.start<gated_sdpa_dq<T, Dims::kD, Dims::kDv, kSoftcap, kMask>>(
        "gated_sdpa_dq", {gated_sdpa_blocks<Tiles::kRows>(p.forward)}, Tiles::kThreads, Tiles::kSharedBytes, p);
  });
}

}  // namespace nsk::cuda
