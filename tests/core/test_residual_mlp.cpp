// Residual MLPs, forward and backward, against their definition in double, on every instruction set of this processor
// and on the emulated AVX-512 ones. Each tensor lies in a block of exactly its size, so that sanitizers see any
// overrun.
//
// What a forward keeps is judged block by block, each from the input that was kept of it, and a backward by what was
// kept for it: errors made before are no part of the judgement. Only y of a forward that keeps nothing has all layers'
// errors in it.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "residual_mlp_case.h"
#include "residual_mlp_definition.h"

using namespace nsk;
using definition::Gradients, definition::Kept, definition::Network, definition::Numbers;

namespace {

double roundoff(int dtype) {
  return dtype == NSK_F64 ? 0x1p-53 : dtype == NSK_F32 ? 0x1p-24 : dtype == NSK_BF16 ? 0x1p-8 : 0x1p-11;
}
double smallest(int dtype) { return dtype == NSK_F16 ? 0x1p-24 : dtype == NSK_F64 ? 1e-300 : 1e-37; }
double largest(int dtype) { return dtype == NSK_F16 ? 65504 : dtype == NSK_F64 ? 1e300 : 3e38; }

class Run {
 public:
  Run(const Kernels& kernels, const Case& the_case)
      : k(kernels), c(the_case), in(c),
        operand(kernels.bf16_dot && c.dtype() == NSK_BF16 ? roundoff(NSK_BF16) : roundoff(c.wide())) {
    Forward plain(c), kept(c), block(c);
    forward(plain, false, false), forward(kept, true, true), forward(block, true, false);
    CHECK(kept.y.same_bytes(block.y) && same(kept.stream, block.stream), "%s", where("keeping less").c_str());
    for (int64_t group = 0; group < c.groups; ++group) {
      const Network net = in.network(c, group, roundoff(c.wide()), operand);
      for (int64_t row = 0; row < c.rows; ++row) check_plain(net, plain, group, row), check_kept(net, kept, group, row);
    }
    check_last_lanes(kept);

    std::vector<Argument> grads = backward(kept, c.wants_parameters(), true), again = backward(kept, true, false);
    for (int which = 0; which < kParameters; ++which)
      if (c.wants[which]) CHECK(grads[which].same_bytes(again[which]), "%s", where(kNames[which]).c_str());
    check_gradients(kept, grads);
  }

 private:
  nsk_residual_mlp arguments(const Forward* kept, bool stream, bool normalised) const {
    nsk_residual_mlp a{};
    a.groups = c.groups, a.rows = c.rows, a.width = c.width, a.depth = c.depth, a.layers_per_block = c.per_block;
    a.x = in.of[X].view, a.weight = in.of[Weight].view, a.bias = in.of[Bias].view;
    a.ln_weight = in.of[Gamma].view, a.ln_bias = in.of[Beta].view;
    a.eps = c.eps, a.activation = c.activation, a.threads = c.threads;
    if (stream) a.stream = kept->stream.view();
    if (normalised) a.normalised = kept->normalised.view(), a.rstd = kept->rstd.view();
    return a;
  }
  void forward(Forward& out, bool stream, bool normalised) const {
    nsk_residual_mlp a = arguments(&out, stream, normalised);
    a.y = out.y.view;
    CHECK(k.residual_mlp_forward(a) == NSK_OK);
    CHECK(out.y.gaps_untouched(), "%s", where("y").c_str());
  }
  std::vector<Argument> backward(const Forward& kept, bool stream, bool normalised) const {
    std::vector<Argument> grads;
    grads.emplace_back(c.dtypes[X], Argument::Size{c.groups, 1, c.rows, c.width}, Inputs::gap(3));
    for (int which : {Weight, Bias, Gamma, Beta})
      grads.emplace_back(c.dtypes[which], Argument::Size{c.groups, c.depth, which == Weight ? c.width : 1, c.width});
    nsk_residual_mlp_backward b{};
    b.forward = arguments(&kept, stream, normalised);
    b.grad_y = in.grad_y.view;
    nsk_view* const views[] = {&b.grad_x, &b.grad_weight, &b.grad_bias, &b.grad_ln_weight, &b.grad_ln_bias};
    for (int which = 0; which < kParameters; ++which)
      if (c.wants[which]) *views[which] = grads[which].view;
    CHECK(k.residual_mlp_backward(b) == NSK_OK);
    CHECK(grads[X].gaps_untouched(), "%s", where("dx").c_str());
    return grads;
  }

  // All layers in a row, from x on.
  void check_plain(const Network& net, const Forward& out, int64_t group, int64_t row) const {
    Numbers h = row_of_x(group, row);
    std::vector<Kept> layers(net.depth);
    for (int64_t block = 0; block < c.blocks(); ++block) net.block(block, h, layers);
    check_y("y", out, group, row, h);
  }
  // Each block by itself, from what is kept of its input.
  void check_kept(const Network& net, const Forward& out, int64_t group, int64_t row) const {
    std::vector<Kept> layers(net.depth);
    Numbers h = row_of_x(group, row);
    for (int64_t block = 0; block < c.blocks(); ++block) {
      const std::vector<double> input = out.row_of(out.stream, group, block, row);
      for (int64_t i = 0; i < c.width; ++i) close("stream", input[i], h.x[i], h.variance[i], c.wide());
      h = Numbers(net.width), h.x = input;
      net.block(block, h, layers);
    }
    check_y("y beside what is kept", out, group, row, h);
    for (int64_t l = 0; l < c.depth; ++l) {
      const Kept& kept = layers[l];
      for (int64_t i = 0; i < c.width; ++i)
        close("normalised", Forward::in_strips(out.normalised, group, l, row, i), kept.normalised.x[i],
              kept.normalised.variance[i], c.dtype());
      close("rstd", Forward::in_strips(out.rstd, group, l, row, 0), kept.rstd, kept.rstd_variance, c.wide());
    }
  }
  void check_y(const char* what, const Forward& out, int64_t group, int64_t row, const Numbers& h) const {
    for (int64_t i = 0; i < c.width; ++i)
      close(what, out.y.computed(group, 0, row, i), h.x[i], h.variance[i], c.dtypes[X]);
  }
  Numbers row_of_x(int64_t group, int64_t row) const {
    Numbers h(c.width);
    for (int64_t i = 0; i < c.width; ++i) h.x[i] = in.of[X](group, 0, row, i);
    return h;
  }
  void check_last_lanes(const Forward& kept) const {
    bool repeated = true;
    for (const Tensor* t : {&kept.stream, &kept.normalised, &kept.rstd})
      for (int64_t group = 0; group < c.groups; ++group)
        for (int64_t l = 0; l < t->n[1]; ++l)
          for (int64_t row = c.rows; row < c.strips() * NSK_STRIP; ++row)
            repeated &= kept.row_of(*t, group, l, row) == kept.row_of(*t, group, l, c.rows - 1);
    CHECK(repeated, "%s", where("lanes past the last row").c_str());
  }

  void check_gradients(const Forward& out, const std::vector<Argument>& grads) const {
    for (int64_t group = 0; group < c.groups; ++group) {
      const Network net = in.network(c, group, roundoff(c.wide()), operand);
      Gradients expected(net);
      for (int64_t row = 0; row < c.rows; ++row) {
        std::vector<Kept> kept(net.depth);
        std::vector<std::vector<double>> stream;
        for (int64_t block = 0; block < c.blocks(); ++block)
          stream.push_back(out.row_of(out.stream, group, block, row));
        for (int64_t l = 0; l < c.depth; ++l) {
          kept[l].normalised.x = out.row_of(out.normalised, group, l, row);
          kept[l].rstd = Forward::in_strips(out.rstd, group, l, row, 0);
        }
        Numbers gradient(net.width);
        for (int64_t i = 0; i < c.width; ++i) gradient.x[i] = in.grad_y(group, 0, row, i);
        definition::backward(net, kept, stream, size_t(c.rows), gradient, expected);
        if (!c.wants[X]) continue;
        for (int64_t i = 0; i < c.width; ++i)
          close("dx", grads[X].computed(group, 0, row, i), gradient.x[i], gradient.variance[i], c.dtypes[X]);
      }
      // Rows alike are off alike.
      const double alike = in.of[X].n[2] < c.rows || in.grad_y.n[2] < c.rows ? double(c.rows) : 1;
      const Numbers* const of[] = {nullptr, &expected.weight, &expected.bias, &expected.gamma, &expected.beta};
      for (int which : {Weight, Bias, Gamma, Beta}) {
        if (!c.wants[which]) continue;
        const Tensor& grad = grads[which].memory;
        const size_t n = of[which]->size();
        for (size_t i = 0; i < n; ++i)
          close(kNames[which], grad.computed(group * n + i), of[which]->x[i], alike * of[which]->variance[i],
                c.dtypes[which]);
      }
    }
  }

  void close(const char* what, double got, double exact, double variance, int dtype) const {
    const double off = 8 * std::sqrt(variance) + 1.01 * roundoff(dtype) * std::fabs(exact) + smallest(dtype);
    const double e = std::fabs(got - exact);
    if (e <= off) return;
    if (std::isinf(got) && got * exact > 0 && std::fabs(exact) + off > largest(dtype)) return;
    CHECK(e <= off, "%s: got %.9g, expected %.9g +- %.1e", where(what).c_str(), got, exact, off);
  }
  static bool same(const Tensor& a, const Tensor& b) {
    return !std::memcmp(a.bytes.get(), b.bytes.get(), a.count() * Tensor::size_of(a.dtype));
  }
  std::string where(const char* what) const {
    char text[300];
    std::snprintf(text, sizeof text,
                  "%s %s; groups %ld rows %ld width %ld depth %ld per_block %ld dtypes %d %d %d %d %d activation %d "
                  "threads %d eps %g wants %d%d%d%d%d",
                  k.name, what, long(c.groups), long(c.rows), long(c.width), long(c.depth), long(c.per_block),
                  c.dtypes[X], c.dtypes[Weight], c.dtypes[Bias], c.dtypes[Gamma], c.dtypes[Beta], c.activation,
                  c.threads, c.eps, c.wants[X], c.wants[Weight], c.wants[Bias], c.wants[Gamma], c.wants[Beta]);
    return text;
  }

  const Kernels& k;
  const Case& c;
  const Inputs in;
  const double operand;
};

// Calls that end before anything is read: nothing is where these pointers point.
void check_refusals() {
  char nowhere;
  auto make = [&](int64_t groups, int64_t rows, int64_t width) {
    nsk_residual_mlp_backward b{};
    nsk_residual_mlp& a = b.forward;
    a.groups = groups, a.rows = rows, a.width = width, a.depth = 2, a.layers_per_block = 2, a.threads = 2, a.eps = 1e-6;
    for (nsk_view* v : {&a.x, &a.weight, &a.bias, &a.ln_weight, &a.ln_bias, &a.y, &a.stream, &a.normalised, &a.rstd,
                        &b.grad_y, &b.grad_x, &b.grad_weight, &b.grad_bias, &b.grad_ln_weight, &b.grad_ln_bias})
      v->data = &nowhere;
    a.weight.stride[2] = width;
    return b;
  };
  auto nothing_kept = [](nsk_residual_mlp& a) { a.stream.data = a.normalised.data = a.rstd.data = nullptr; };

  // ---- the C ABI: arguments that contradict each other, and no rows
  auto refused = [&](auto&& spoil, bool forward_too = true) {
    nsk_residual_mlp_backward b = make(1, 0, 8);
    CHECK(nsk_cpu_residual_mlp_forward(&b.forward) == NSK_OK);
    CHECK(nsk_cpu_residual_mlp_backward(&b) == NSK_OK);
    spoil(b);
    if (forward_too) CHECK(nsk_cpu_residual_mlp_forward(&b.forward) == NSK_BAD_ARGUMENT);
    CHECK(nsk_cpu_residual_mlp_backward(&b) == NSK_BAD_ARGUMENT);
  };
  refused([](auto& b) { b.forward.depth = 3; });
  refused([](auto& b) { b.forward.layers_per_block = 4; });
  refused([](auto& b) { b.forward.layers_per_block = 0; });
  refused([](auto& b) { b.forward.depth = 0; });
  refused([](auto& b) { b.forward.width = 0; });
  refused([](auto& b) { b.forward.rows = -1; });
  refused([](auto& b) { b.forward.groups = -1; });
  refused([](auto& b) { b.forward.threads = 0; });
  refused([](auto& b) { b.forward.activation = 3; });
  refused([](auto& b) { b.forward.activation = -1; });
  refused([](auto& b) { b.forward.weight.stride[2] = 9; });
  refused([](auto& b) { b.forward.rstd.data = nullptr; });
  refused([](auto& b) { b.forward.normalised.data = nullptr; });
  refused([&](auto& b) { nothing_kept(b.forward); }, false);
  refused([](auto& b) { b.forward.stream.data = nullptr; }, false);  // the weight's gradient needs it

  for (const Kernels* k : kernels_under_test()) {
    nsk_residual_mlp_backward b = make(2, 1, 8);
    b.forward.weight.dtype = NSK_BOOL;
    CHECK(k->residual_mlp_forward(b.forward) == NSK_BAD_ARGUMENT, "%s", k->name);
    CHECK(k->residual_mlp_backward(b) == NSK_BAD_ARGUMENT, "%s", k->name);

    // ---- memory that no machine has
    for (int32_t dtype : {NSK_F32, NSK_F64, NSK_BF16, NSK_F16}) {
      const int64_t huge = int64_t(1) << 44;
      auto forward = [&](int64_t groups, int64_t rows, int64_t width, bool keep) {
        b = make(groups, rows, width);
        b.forward.weight.dtype = dtype;
        if (!keep) nothing_kept(b.forward);
        CHECK(k->residual_mlp_forward(b.forward) == NSK_OUT_OF_MEMORY, "%s dtype %d", k->name, dtype);
      };
      forward(1, 100, huge, true), forward(1, 100, huge, false), forward(1, 16, huge, false);
      forward(1, 3, huge, false), forward(huge, 3, 8, false);
      b = make(1, huge, 64);
      b.forward.weight.dtype = dtype;
      CHECK(k->residual_mlp_backward(b) == NSK_OUT_OF_MEMORY, "%s dtype %d", k->name, dtype);
      b.forward.normalised.data = b.forward.rstd.data = nullptr;  // to be computed again
      CHECK(k->residual_mlp_backward(b) == NSK_OUT_OF_MEMORY, "%s dtype %d", k->name, dtype);
    }
  }
}

}  // namespace

int main() {
  check_refusals();
  for (const Kernels* kernels : kernels_under_test()) {
    rng.seed(7);
    const int before = check::failures;
    for (int i = 0; i < 250; ++i) Run(*kernels, random_case());
    std::printf("%s: %s\n", kernels->name, check::failures == before ? "ok" : "FAILED");
  }
  return check::result("residual_mlp");
}
