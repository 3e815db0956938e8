// Starts dK and dV of one pair of head dimensions: in one launch, or, where heads are too wide for that, in one each.
#pragma once

#include "gated_sdpa_dkdv.cuh"
#include "gated_sdpa_launch.cuh"

namespace nsk::cuda {

template <class T, class Dims, Wanted kWanted>
nsk_status start_keys(const GatedSdpaBackward<T>& p, Mask mask, const Launcher& launcher) {
  using Tiles = GatedSdpaKeyTiles<T, Dims::kD, Dims::kDv, kWanted>;
  return with_scores_of(p.forward.softcap > 0, mask, [&]<bool kSoftcap, Mask kMask>() {
    return launcher.start<gated_sdpa_dkdv<T, Dims::kD, Dims::kDv, kSoftcap, kMask, kWanted>>(
        "gated_sdpa_dkdv", {gated_sdpa_key_blocks<Tiles::kKeys>(p.forward)}, Tiles::kThreads, Tiles::kSharedBytes, p);
  });
}

template <class T, class Dims>
nsk_status start_dkdv(const GatedSdpaBackward<T>& p, Mask mask, const Launcher& launcher) {
  if constexpr (kKeyAndValueFit<T, Dims::kD, Dims::kDv>) {
    return start_keys<T, Dims, Wanted::both>(p, mask, launcher);
  } else {
    if (p.grad_key) {
      const nsk_status status = start_keys<T, Dims, Wanted::key>(p, mask, launcher);
      if (status != NSK_OK) return status;
    }
    return p.grad_value ? start_keys<T, Dims, Wanted::value>(p, mask, launcher) : NSK_OK;
  }
}

}  // namespace nsk::cuda
