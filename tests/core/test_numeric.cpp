// bf16 and fp16: every bit pattern survives the round trip, and rounding is to nearest, ties to even.
#include <cmath>
#include <cstdint>
#include <random>

#include "../../csrc/common/numeric.h"
#include "check.h"

using namespace nsk;

template <class H, class Round>
static void exhaustive(Round round, const char* name) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const H h{uint16_t(bits)};
    const float x = to_float(h);
    if (x != x)
      CHECK(to_float(round(x)) != to_float(round(x)), "%s NaN %04x", name, bits);
    else
      CHECK(round(x).bits == bits, "%s %04x -> %04x", name, bits, round(x).bits);
  }
}

template <class H, class Round>
static void nearest(Round round, const char* name) {
  std::mt19937 random(1);
  for (int i = 0; i < 1000000; ++i) {
    const float x = bit_cast<float>(uint32_t(random()));
    if (!(std::fabs(x) < 1e30f)) continue;
    const H h = round(x);
    const float y = to_float(h);
    if (std::isinf(y)) continue;  // beyond the largest number
    for (int step : {-1, 1}) {
      const float other = to_float(H{uint16_t(h.bits + step)});
      if (!std::isfinite(other) || (other < 0) != (y < 0)) continue;
      const double mine = std::fabs(double(y) - x), theirs = std::fabs(double(other) - x);
      CHECK(mine < theirs || (mine == theirs && h.bits % 2 == 0), "%s %a -> %a, not %a", name, x, y, other);
    }
  }
}

int main() {
  exhaustive<bf16>(to_bf16, "bf16");
  exhaustive<f16>(to_f16, "f16");
  nearest<bf16>(to_bf16, "bf16");
  nearest<f16>(to_f16, "f16");
  CHECK(std::isinf(to_float(to_f16(65520.0f))));
  CHECK(to_float(to_f16(65519.0f)) == 65504.0f);
  CHECK(to_float(to_f16(0x1p-25f)) == 0.0f);
  CHECK(to_float(to_f16(0x1.8p-25f)) == 0x1p-24f);
  return check::result("numeric");
}
