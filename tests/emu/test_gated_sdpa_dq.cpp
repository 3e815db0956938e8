// The query's gradient of gated attention and the row-wise launch before it against their definition in double.
#include "gated_sdpa_backward.h"

using namespace nsk;
using namespace nsk::test;

namespace {

struct Counted {
  emu::Counts rows, dq;
};

template <class T, int kD, int kDv = kD, bool kSoftcap = false, Mask kMask = Mask::none>
Counted prove(const std::string& name, const SdpaCase& c, const BackwardCase& more = {}, bool all = false) {
  BackwardProblem<T, kD, kDv, kSoftcap, kMask> problem(c, more);
  Counted counts;
  const std::vector<Options> schedules = all ? emu::all_schedules(3) : std::vector<Options>(1);
  for (const Options& options : schedules) {
    try {
      const Outcome rows = problem.run_rows(options);
      CHECK(rows.right, "%s: rows wrong (%s)", name.c_str(), options.name().c_str());
      const Outcome dq = problem.run_dq(options);
      CHECK(dq.right, "%s: dq wrong (%s)", name.c_str(), options.name().c_str());
      counts = {rows.report.counts, dq.report.counts};
      CHECK(counts.dq.bank_conflicts == 0, "%s", name.c_str());
    } catch (const Error& e) {
      CHECK(false, "%s (%s): %s", name.c_str(), options.name().c_str(), e.what());
    }
  }
  std::printf("%s: largest errors %.2f and %.2f of what is allowed\n", name.c_str(), problem.worst_rows, problem.worst);
  return counts;
}

}  // namespace

int main() {
  prove<bf16, 64>("plain", {.seqlen_q = 70, .seqlen_k = 130, .gate = Gate::none}, {}, true);
  prove<bf16, 64>("causal", {.seqlen_q = 130, .seqlen_k = 130, .causal = true}, {.grad_lse = true}, true);
  return check::result("emu gated_sdpa_dq");
}
