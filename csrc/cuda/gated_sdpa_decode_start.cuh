// Starts a decode of one pair of head dimensions: the parts, and what joins them.
#pragma once

#include "gated_sdpa_decode.cuh"
#include "gated_sdpa_launch.cuh"

namespace nsk::cuda {

template <class T, class Dims>
nsk_status start_decode(const GatedSdpa<T>& p, Mask mask, int parts, const Launcher& launcher, Scratch& scratch) {
  using Tiles = GatedSdpaDecodeTiles<T, Dims::kD, Dims::kDv>;
  GatedSdpaDecode<T> decode{p, parts, {}, {}, {}};
  const int64_t rows = parts * decode.rows();
  decode.part_out = scratch.take<float>(rows * Dims::kDv);
  decode.part_top = scratch.take<float>(rows), decode.part_sum = scratch.take<float>(rows);
  const GatedSdpaMerge<T> merge{decode, Dims::kDv};
  const nsk_status status = with_scores_of(p.softcap > 0, mask, [&]<bool kSoftcap, Mask kMask>() {
    return launcher.start<gated_sdpa_decode<T, Dims::kD, Dims::kDv, kSoftcap, kMask>>(
        "gated_sdpa_decode", {decode.blocks()}, Tiles::kThreads, Tiles::kSharedBytes, decode);
  });
  if (status != NSK_OK) return status;
  return launcher.start<gated_sdpa_merge<T>>("gated_sdpa_merge", {merge.blocks()}, GatedSdpaMergeTiles::kThreads, 0,
                                             merge);
}

}  // namespace nsk::cuda
