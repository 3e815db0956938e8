// Residual MLPs in double, a row of one network at a time, and beside every number the variance of what rounding makes
// of it: each product and sum is off by its unit roundoff, independently of all others, and layers pass errors on.
//
// Only that tells what a kernel may be off by. LayerNorm divides by a spread that may be next to nothing, and its
// gradient is what is left of three terms as large as ever: nothing, where there is one feature.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "../../csrc/include/nsk.h"

namespace definition {

struct Numbers {
  std::vector<double> x, variance;

  explicit Numbers(size_t n = 0) : x(n), variance(n) {}
  size_t size() const { return x.size(); }
  void add(size_t i, double value, double off) { x[i] += value, variance[i] += off; }
};

// What a forward keeps of one layer of one row.
struct Kept {
  Numbers normalised;
  double rstd = 0, rstd_variance = 0;
};

inline double square(double x) { return x * x; }

struct Activated {
  double value, slope;
};
inline Activated activate(int activation, double y) {
  if (activation == NSK_RELU) return {y > 0 ? y : 0, y > 0 ? 1. : 0.};
  if (activation == NSK_SILU) {
    const double s = 1 / (1 + std::exp(-y));
    return {y * s, s * (1 + y * (1 - s))};
  }
  const double k = std::sqrt(2 / M_PI), t = std::tanh(k * (y + 0.044715 * y * y * y));
  return {0.5 * y * (1 + t), 0.5 * (1 + t) + 0.5 * y * (1 - t * t) * k * (1 + 3 * 0.044715 * y * y)};
}

struct Network {
  size_t width, depth, per_block;
  int activation;
  double eps;
  double compute, operand;  // unit roundoffs: of sums, of what products multiply
  std::vector<double> weight, bias, gamma, beta;  // [layer][out][in], [layer][width]

  // The variance of a sum of n terms, in units of the sum of their squares.
  double summed(double n) const { return square(compute) * (2 + n / 4); }
  double multiplied(double n) const { return square(operand) + summed(n); }

  // t becomes what layer l makes of it.
  Kept layer(size_t l, Numbers& t) const {
    const size_t n = width;
    std::vector<double> terms(n), z(n), off(n);
    for (size_t i = 0; i < n; ++i) terms[i] = t.variance[i] + square(t.x[i]) * multiplied(double(n));
    double mean = 0, mean_off = 0, spread = 0, spread_off = summed(double(n));
    for (size_t o = 0; o < n; ++o) {
      const double *w = &weight[(l * n + o) * n], b = bias[l * n + o];
      z[o] = b, off[o] = square(b) * summed(1);
      for (size_t i = 0; i < n; ++i) z[o] += w[i] * t.x[i], off[o] += w[i] * w[i] * terms[i];
      off[o] += square(z[o]) * summed(1);
      mean += z[o] / double(n);
      mean_off += (off[o] + square(z[o]) * summed(double(n))) / square(double(n));
    }
    for (double x : z) spread += square(x - mean) / double(n);
    Kept kept{Numbers(n), 1 / std::sqrt(spread + eps)};
    Numbers& xhat = kept.normalised;
    for (size_t o = 0; o < n; ++o) {
      xhat.x[o] = (z[o] - mean) * kept.rstd;
      spread_off += square(xhat.x[o] * kept.rstd / double(n)) * off[o];
    }
    kept.rstd_variance = square(kept.rstd) * spread_off;
    for (size_t o = 0; o < n; ++o) {
      const double g = gamma[l * n + o], b = beta[l * n + o], scaled = xhat.x[o] * g;
      // The mean of a single feature is that feature, exactly.
      if (n > 1)
        xhat.variance[o] =
            square(kept.rstd) * (off[o] + mean_off) + square(xhat.x[o]) * (spread_off + summed(1));
      t.x[o] = activate(activation, scaled + b).value;
      // No activation is steeper than the root of 1.3.
      t.variance[o] = 1.3 * (square(g) * xhat.variance[o] + (square(scaled) + square(b)) * summed(1)) +
                      square(t.x[o]) * summed(8);
    }
    return kept;
  }

  // h becomes what a block makes of it; kept: of all layers.
  void block(size_t index, Numbers& h, std::vector<Kept>& kept) const {
    Numbers t = h;
    for (size_t l = index * per_block; l < (index + 1) * per_block; ++l) kept[l] = layer(l, t);
    for (size_t i = 0; i < width; ++i) {
      h.add(i, t.x[i], t.variance[i]);
      h.variance[i] += square(h.x[i]) * summed(1);
    }
  }
};

// The gradients of one network's parameters, shaped as they are.
struct Gradients {
  Numbers weight, bias, gamma, beta;

  explicit Gradients(const Network& net)
      : weight(net.weight.size()), bias(net.bias.size()), gamma(bias.size()), beta(bias.size()) {}
};

// Goes back through the network along one row of `rows`, given what was kept of it: `kept` of all layers and `stream`,
// what entered the blocks. `gradient` is that of y and becomes that of x.
inline void backward(const Network& net, const std::vector<Kept>& kept, const std::vector<std::vector<double>>& stream,
                     size_t rows, Numbers& gradient, Gradients& parameters) {
  const size_t n = net.width;
  const double one = net.summed(1), over_rows = net.summed(double(rows)), wide = net.summed(double(n));
  const double product_over_rows = over_rows + 2 * square(net.operand);
  Numbers da, input(n), u(n), dz(n);
  for (size_t l = net.depth; l-- > 0;) {
    if ((l + 1) % net.per_block == 0) da = gradient;
    const std::vector<double>& xhat = kept[l].normalised.x;
    const double rstd = kept[l].rstd, per_feature = 1 / double(n);
    double c1 = 0, c2 = 0, c1_off = 0, c2_off = 0;
    for (size_t i = 0; i < n; ++i) {
      const double g = net.gamma[l * n + i], scaled = xhat[i] * g, b = net.beta[l * n + i];
      const double y_off = (square(scaled) + square(b)) * one, y = scaled + b;
      const double slope = activate(net.activation, y).slope;
      // No slope changes faster than by 1 per 1; but relu's is 0 or 1 where rounding decides y's sign.
      double slope_off = y_off + net.summed(8);
      if (net.activation == NSK_RELU) slope_off = square(y) < 16 * y_off;
      const double dy = da.x[i] * slope;
      const double dy_off = square(slope) * da.variance[i] + square(da.x[i]) * slope_off + square(dy) * one;
      parameters.beta.add(l * n + i, dy, dy_off + square(dy) * over_rows);
      parameters.gamma.add(l * n + i, dy * xhat[i], square(xhat[i]) * (dy_off + square(dy) * over_rows));
      u.x[i] = dy * g, u.variance[i] = square(g) * (dy_off + square(dy) * one);
      c1 += u.x[i] * per_feature, c2 += u.x[i] * xhat[i] * per_feature;
      const double off = (u.variance[i] + square(u.x[i]) * wide) * square(per_feature);
      c1_off += off, c2_off += off * square(xhat[i]);
    }
    for (size_t i = 0; i < n; ++i) {
      dz.x[i] = rstd * (u.x[i] - c1 - xhat[i] * c2);
      dz.variance[i] = square(rstd) * (u.variance[i] + c1_off + square(xhat[i]) * c2_off +
                                       (square(u.x[i]) + square(c1) + square(xhat[i] * c2)) * one);
      parameters.bias.add(l * n + i, dz.x[i], dz.variance[i] + square(dz.x[i]) * over_rows);
    }

    const bool starts_block = l % net.per_block == 0;
    for (size_t i = 0; i < n; ++i) {  // what went into the layer
      if (starts_block) {
        input.x[i] = stream[l / net.per_block][i], input.variance[i] = 0;
        continue;
      }
      const double b = net.beta[(l - 1) * n + i], scaled = kept[l - 1].normalised.x[i] * net.gamma[(l - 1) * n + i];
      input.x[i] = activate(net.activation, scaled + b).value;
      input.variance[i] = 1.3 * (square(scaled) + square(b)) * one + square(input.x[i]) * net.summed(8);
    }
    da = Numbers(n);
    for (size_t i = 0; i < n; ++i) input.variance[i] += square(input.x[i]) * product_over_rows;
    for (size_t o = 0; o < n; ++o) {
      const double d = dz.x[o], d2 = d * d, off = dz.variance[o], *w = &net.weight[(l * n + o) * n];
      const double passed_off = off + d2 * net.multiplied(double(n));
      double *grad = &parameters.weight.x[(l * n + o) * n], *grad_off = &parameters.weight.variance[(l * n + o) * n];
      for (size_t i = 0; i < n; ++i) {
        grad[i] += d * input.x[i];
        grad_off[i] += off * input.x[i] * input.x[i] + d2 * input.variance[i];
        da.x[i] += w[i] * d;
        da.variance[i] += w[i] * w[i] * passed_off;
      }
    }
    if (starts_block)
      for (size_t i = 0; i < n; ++i) {
        gradient.add(i, da.x[i], da.variance[i]);
        gradient.variance[i] += square(gradient.x[i]) * one;
      }
  }
}

}  // namespace definition
