// The interval of keys a query sees, against the definition, over every small shape.
#include "../../csrc/common/mask.h"
#include "check.h"

int main() {
  for (int64_t sq = 0; sq <= 6; ++sq)
    for (int64_t sk = 0; sk <= 6; ++sk)
      for (int causal = 0; causal < 2; ++causal)
        for (int bottom = 0; bottom < 2; ++bottom)
          for (int64_t left = -1; left <= 8; ++left)
            for (int64_t right = -1; right <= 8; ++right) {
              const auto mask = nsk::PositionMask::make(sq, sk, causal, bottom, left, right);
              for (int64_t i = 0; i < sq; ++i) {
                const nsk::KeyRange keys = mask.keys(i);
                const int64_t center = i + (bottom ? sk - sq : 0);
                for (int64_t j = 0; j < sk; ++j) {
                  const bool allowed = (!causal || j <= center) && (left < 0 || j >= center - left) &&
                                       (right < 0 || j <= center + right);
                  CHECK(allowed == (j >= keys.begin && j < keys.end), "sq %d sk %d i %d j %d", int(sq), int(sk), int(i),
                        int(j));
                }
                CHECK(0 <= keys.begin && keys.begin <= keys.end && keys.end <= sk);
              }
            }
  // Bounds near the end of the integers do not overflow.
  const auto wide = nsk::PositionMask::make(4, 4, false, true, INT64_MAX, INT64_MAX);
  CHECK(wide.keys(3).begin == 0 && wide.keys(0).end == 4);
  return check::result("mask");
}
