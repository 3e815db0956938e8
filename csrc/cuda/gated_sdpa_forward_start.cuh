// Starts the forward of one pair of head dimensions.
#pragma once

#include "gated_sdpa_forward.cuh"
#include "gated_sdpa_launch.cuh"

namespace nsk::cuda {

template <class T, class Dims>
nsk_status start_forward(const GatedSdpa<T>& p, Mask mask, const Launcher& launcher) {
  using Tiles = GatedSdpaTiles<T, Dims::kD, Dims::kDv>;
  const int64_t blocks = gated_sdpa_blocks<Tiles::kRows>(p);
  if (blocks == 0) return NSK_OK;
  return with_scores_of(p.softcap > 0, mask, [&]<bool kSoftcap, Mask kMask>() {
    return launcher.start<gated_sdpa_forward<T, Dims::kD, Dims::kDv, kSoftcap, kMask>>(
        "gated_sdpa_forward", {blocks}, Tiles::kThreads, Tiles::kSharedBytes, p);
  });
}

}  // namespace nsk::cuda
