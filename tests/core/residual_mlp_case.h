// Random calls of residual MLPs: their sizes and options, their tensors, and what a forward writes.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "residual_mlp_definition.h"
#include "tensor.h"

namespace nsk {

enum Parameter { X, Weight, Bias, Gamma, Beta, kParameters };
inline const char* const kNames[] = {"dx", "dweight", "dbias", "dgamma", "dbeta"};

struct Case {
  int64_t groups, rows, width, depth, per_block;
  int dtypes[kParameters];
  int activation, threads;
  double eps;
  bool wants[kParameters];

  int dtype() const { return dtypes[Weight]; }
  int wide() const { return dtype() == NSK_F64 ? NSK_F64 : NSK_F32; }
  int64_t blocks() const { return depth / per_block; }
  int64_t strips() const { return (rows + NSK_STRIP - 1) / NSK_STRIP; }
  bool wants_parameters() const { return std::count(wants + Weight, wants + kParameters, true) > 0; }
};

inline int64_t between(int64_t least, int64_t most) { return least + int64_t(rng() % uint64_t(most - least + 1)); }

inline Case random_case() {
  Case c{};
  c.groups = pick({1, 1, 2, 3});
  c.rows = chance(0.5) ? between(1, 16) : chance(0.6) ? 16 * between(1, 5) + pick({-1, 0, 1}) : between(1, 200);
  c.width = chance(0.5) ? pick({1, 2, 3, 8, 15, 16, 17, 32, 33, 64, 65, 96, 128, 140}) : between(1, 140);
  c.depth = between(1, 9);
  do c.per_block = between(1, chance(0.8) ? 4 : 9);
  while (c.depth % c.per_block);
  c.dtypes[Weight] = pick({NSK_F32, NSK_F64, NSK_BF16, NSK_F16});
  if (chance(0.05)) c.rows = between(500, 600), c.width = between(1, 24);  // sums over rows come in pieces
  if (chance(0.1)) {  // so do weights that are not read in place
    c.rows = between(1, 20), c.width = chance(0.3) ? between(257, 320) : 2 * between(129, 160);
    c.depth = c.per_block = 2;
    if (chance(0.5)) c.dtypes[Weight] = NSK_BF16;
  }
  if (chance(0.07)) {  // many rows and whole tiles, of a matrix unit too
    c.rows = between(96, 320), c.width = 32 * between(1, 5);
    c.dtypes[Weight] = chance(0.7) ? NSK_F32 : NSK_BF16;
    if (chance(0.1)) c.rows = between(96, 130), c.width = 288, c.groups = 1, c.depth = c.per_block = 2;
  }
  for (int which : {X, Bias, Gamma, Beta}) c.dtypes[which] = chance(0.6) ? c.dtype() : int(NSK_F32);
  c.activation = pick({NSK_SILU, NSK_RELU, NSK_GELU_TANH}), c.threads = int(between(1, 4));
  c.eps = chance(0.7) ? 1e-6 : chance(0.5) ? 1e-3 : 0.5;
  if (chance(0.1))  // threads share the columns of few rows
    c.groups = 1, c.rows = between(1, 16), c.width = between(64, 140), c.threads = int(between(2, 4));
  const bool all = chance(0.6);
  for (bool& wanted : c.wants) wanted = all || chance(0.4);
  return c;
}

// An argument [group, layer, row, column], of which dimensions of size 1 broadcast. Behind each row (gap = 3) or each
// matrix of rows (gap = 2) there may be others' elements, and one in front of the first: NaN, as all that was not set.
struct Argument {
  using Size = std::array<int64_t, 4>;
  Size n;
  int64_t before;
  Tensor memory;
  nsk_view view;

  explicit Argument(int dtype, const Size& size, int gap = 0)
      : n(size), before(gap ? pick({0, 1}) : 0),
        memory(dtype, n[0], n[1], n[2] + (gap == 2), n[3] + (gap == 3 ? pick({1, 5}) : 0)), view(memory.view()) {
    view.data = memory.bytes.get() + before * Tensor::size_of(dtype);
    view.stride[3] = 1;
  }
  size_t at(int64_t g, int64_t l, int64_t r, int64_t c) const {
    return size_t(before + g * view.stride[0] + l * view.stride[1] + r * view.stride[2] + c);
  }
  double operator()(int64_t g, int64_t l, int64_t r, int64_t c) const { return memory.x[at(g, l, r, c)]; }
  double computed(int64_t g, int64_t l, int64_t r, int64_t c) const { return memory.computed(at(g, l, r, c)); }

  template <class F>
  void each(const F& f) const {
    for (int64_t g = 0; g < n[0]; ++g)
      for (int64_t l = 0; l < n[1]; ++l)
        for (int64_t r = 0; r < n[2]; ++r)
          for (int64_t c = 0; c < n[3]; ++c) f(at(g, l, r, c));
  }
  Argument& normal(double mean, double deviation) {
    std::normal_distribution<> gauss(mean, deviation);
    each([&](size_t i) { memory.set(i, gauss(rng)); });
    return *this;
  }
  bool same_bytes(const Argument& other) const {
    bool same = true;
    const int size = Tensor::size_of(memory.dtype);
    for (int64_t g = 0; g < n[0]; ++g)
      for (int64_t l = 0; l < n[1]; ++l)
        for (int64_t r = 0; r < n[2]; ++r)
          same &= !std::memcmp(memory.bytes.get() + at(g, l, r, 0) * size,
                               other.memory.bytes.get() + other.at(g, l, r, 0) * size, n[3] * size);
    return same;
  }
  bool gaps_untouched() const {
    std::vector<bool> own(memory.count());
    each([&](size_t i) { own[i] = true; });
    const int size = Tensor::size_of(memory.dtype);
    for (size_t i = 0; i < own.size() * size; ++i)
      if (!own[i / size] && memory.bytes[i] != char(0xff)) return false;
    return true;
  }
};

struct Inputs {
  std::vector<Argument> of;  // as Parameter
  Argument grad_y;

  static int gap(int dimension) { return chance(0.5) ? dimension : 0; }
  static int64_t shared(int64_t n, double p) { return chance(p) ? 1 : n; }

  explicit Inputs(const Case& c) : grad_y(c.dtypes[X], {c.groups, 1, shared(c.rows, 0.05), c.width}, gap(3)) {
    of.emplace_back(c.dtypes[X], Argument::Size{shared(c.groups, 0.3), 1, shared(c.rows, 0.05), c.width}, gap(3));
    auto parameter = [&](int which, int64_t rows, double mean, double deviation) {
      const Argument::Size n{shared(c.groups, 0.1), shared(c.depth, 0.1), rows, c.width};
      of.emplace_back(c.dtypes[which], n, gap(which == Weight ? 2 : 3));
      of.back().normal(mean, deviation);
    };
    parameter(Weight, c.width, 0, 1 / std::sqrt(double(c.width)));
    of[Weight].view.stride[2] = c.width;
    parameter(Bias, 1, 0, 0.3), parameter(Gamma, 1, 1, 0.3), parameter(Beta, 1, 0, 0.3);
    of[X].normal(0, 1), grad_y.normal(0, 1);
  }

  // The network of one group; `compute`, `operand`: the unit roundoffs of what its kernels do.
  definition::Network network(const Case& c, int64_t group, double compute, double operand) const {
    definition::Network net{};
    net.width = size_t(c.width), net.depth = size_t(c.depth), net.per_block = size_t(c.per_block);
    net.activation = c.activation, net.eps = c.eps, net.compute = compute, net.operand = operand;
    for (int64_t l = 0; l < c.depth; ++l)
      for (int64_t o = 0; o < c.width; ++o) {
        for (int64_t i = 0; i < c.width; ++i) net.weight.push_back(of[Weight](group, l, o, i));
        net.bias.push_back(of[Bias](group, l, 0, o));
        net.gamma.push_back(of[Gamma](group, l, 0, o));
        net.beta.push_back(of[Beta](group, l, 0, o));
      }
    return net;
  }
};

// What a forward writes. A matrix in strips is [strip][column][lane].
struct Forward {
  Argument y;
  Tensor stream, normalised, rstd;
  int64_t strips;

  explicit Forward(const Case& c)
      : y(c.dtypes[X], {c.groups, 1, c.rows, c.width}, Inputs::gap(3)),
        stream(c.wide(), c.groups, c.blocks(), c.strips(), c.width * NSK_STRIP),
        normalised(c.dtype(), c.groups, c.depth, c.strips(), c.width * NSK_STRIP),
        rstd(c.wide(), c.groups, c.depth, c.strips(), NSK_STRIP), strips(c.strips()) {}

  static double in_strips(const Tensor& t, int64_t group, int64_t layer, int64_t row, int64_t column) {
    return t.computed(t.at(group, layer, row / NSK_STRIP, column * NSK_STRIP + row % NSK_STRIP));
  }
  std::vector<double> row_of(const Tensor& t, int64_t group, int64_t layer, int64_t row) const {
    std::vector<double> x;
    for (int64_t i = 0; i < t.n[3] / NSK_STRIP; ++i) x.push_back(in_strips(t, group, layer, row, i));
    return x;
  }
};

}  // namespace nsk
