// What the kernels' tests share: random numbers, tensors, and the kernels of every instruction set.
#pragma once

#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/common/numeric.h"
#include "../../csrc/cpu/kernels.h"

namespace nsk::emulated_avx512_amx {
extern const Kernels kernels;
}
namespace nsk::emulated_avx512_bf16 {
extern const Kernels kernels;
}

namespace nsk {

inline std::mt19937 rng(7);
inline int pick(std::initializer_list<int> of) { return of.begin()[rng() % of.size()]; }
inline bool chance(double p) { return std::uniform_real_distribution<>(0, 1)(rng) < p; }

// A dense tensor [n0][n1][n2][n3] kept twice: as double, and as the bytes that the kernels see.
struct Tensor {
  int64_t n[4];
  int dtype;
  std::vector<double> x;
  std::unique_ptr<char[]> bytes;

  static int size_of(int dtype) { return dtype == NSK_F64 ? 8 : dtype == NSK_F32 ? 4 : dtype == NSK_BOOL ? 1 : 2; }

  Tensor(int dt, int64_t a, int64_t b, int64_t c, int64_t e) : n{a, b, c, e}, dtype(dt), x(a * b * c * e) {
    bytes.reset(new char[count() * size_of(dtype)]);
    std::memset(bytes.get(), 0xff, count() * size_of(dtype));  // NaN in every type
  }
  size_t count() const { return x.size(); }
  Tensor& normal() {
    std::normal_distribution<> gauss;
    for (size_t i = 0; i < count(); ++i) set(i, gauss(rng));
    return *this;
  }
  void set(size_t i, double value) {
    char* p = bytes.get() + i * size_of(dtype);
    auto put = [&](auto y) { std::memcpy(p, &y, sizeof y), x[i] = to_float(y); };
    if (dtype == NSK_F64) put(value);
    if (dtype == NSK_F32) put(float(value));
    if (dtype == NSK_BF16) put(to_bf16(float(value)));
    if (dtype == NSK_F16) put(to_f16(float(value)));
    if (dtype == NSK_BOOL) *p = value != 0, x[i] = value != 0;
  }
  double computed(size_t i) const {
    const char* p = bytes.get() + i * size_of(dtype);
    auto get = [&](auto y) { return std::memcpy(&y, p, sizeof y), double(to_float(y)); };
    return dtype == NSK_F64 ? get(0.0) : dtype == NSK_F32 ? get(0.0f) : dtype == NSK_BF16 ? get(bf16{}) : get(f16{});
  }
  int64_t at(int64_t b, int64_t h, int64_t i, int64_t j) const {  // size-1 dimensions broadcast
    return ((b % n[0] * n[1] + h % n[1]) * n[2] + i % n[2]) * n[3] + j % n[3];
  }
  nsk_view view() const {
    nsk_view v{bytes.get(), {n[1] * n[2] * n[3], n[2] * n[3], n[3], 1}, dtype};
    for (int k = 0; k < 4; ++k)
      if (n[k] == 1 && k != 3) v.stride[k] = 0;
    if (n[3] == 1) v.stride[3] = 0;
    return v;
  }
};

// Those that this processor runs, and the emulated ones.
inline std::vector<const Kernels*> kernels_under_test() {
  std::vector<const Kernels*> all{&emulated_avx512_amx::kernels};
#if !defined(NSK_ONE_EMULATED)
  all.push_back(&emulated_avx512_bf16::kernels);
#endif
  for (int i = 0; const char* name = nsk_cpu_isa_name(i); ++i)
    if (const Kernels* found = find_kernels(name)) all.push_back(found);
  return all;
}

}  // namespace nsk
