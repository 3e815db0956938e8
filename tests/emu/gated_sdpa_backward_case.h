// What a case of the backward has beside the forward's.
#pragma once

namespace nsk::test {

enum class GradOut { dense, broadcast, columns_apart, misaligned };

struct BackwardCase {
  GradOut grad_out = GradOut::dense;
  bool grad_lse = false, grad_gate = true, grad_sink = true;
  bool misaligned_gate = false;  // and its gradient; the gate is of float
  float far_key = 0;             // what stands in one column of the key `far`
  int far = -1;
  float lift = 0;  // every seventh row's floating mask is this
};

}  // namespace nsk::test
