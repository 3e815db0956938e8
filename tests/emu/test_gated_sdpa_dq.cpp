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

void heads_and_types() {
  const SdpaCase ragged{.batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 150, .causal = true,
                        .bottom_right = true, .sink = true};
  const BackwardCase more{.grad_lse = true};
  prove<bf16, 64>("bf16, 64", ragged, more, true);
  prove<f16, 64>("f16, 64", ragged, more);
  prove<bf16, 80>("bf16, 80", ragged, more);
  prove<f16, 80>("f16, 80", ragged, more);
  prove<f16, 96>("f16, 96", ragged, more);
  prove<bf16, 128>("bf16, 128", ragged, more);
  prove<bf16, 192>("bf16, 192", {.heads_q = 2, .seqlen_q = 33, .seqlen_k = 75, .scale = 0.07f}, more);
  prove<bf16, 192, 128>("bf16, 192 and 128", {.heads_q = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 70});
  prove<f16, 256>("f16, 256", {.seqlen_q = 65, .seqlen_k = 70, .causal = true, .scale = 0.06f}, more, true);
}

void tf32_numbers() {
  SdpaCase c{.batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 150, .causal = true,
             .bottom_right = true, .scale = -0.1f, .sink = true};
  const BackwardCase more{.grad_lse = true};
  prove<tf32, 64>("tf32, 64", c, more, true);
  prove<tf32, 80>("tf32, 80", c, {.grad_out = GradOut::misaligned});
  prove<tf32, 128>("tf32, 128", c, {.grad_out = GradOut::columns_apart});
  c.gate = Gate::headwise, c.hidden_nan = 20, c.nan_in_key = true;
  prove<tf32, 192, 128>("tf32, 192 and 128, NaN", c, more);
  prove<tf32, 256>("tf32, 256, NaN", c, more, true);
  c.softcap = 2, c.mask = Mask::floating, c.float_mask = true;
  prove<tf32, 64, 64, true, Mask::floating>("tf32, floating mask, softcap, NaN", c, more);
}

void lengths_and_positions() {
  const int lengths[][2] = {{1, 1}, {1, 200}, {63, 65}, {64, 64}, {129, 1}, {65, 7}, {3, 0}, {100, 200}, {200, 100}};
  for (const auto& [sq, sk] : lengths)
    for (bool bottom_right : {false, true}) {
      const std::string name = std::to_string(sq) + " rows, " + std::to_string(sk) + " keys" +
                               (bottom_right ? ", bottom right" : "");
      SdpaCase c{.heads_q = 2, .seqlen_q = sq, .seqlen_k = sk, .bottom_right = bottom_right};
      prove<bf16, 64>(name + ", all", c);
      c.causal = true;
      prove<bf16, 64>(name + ", causal", c);
      c.left = 40;
      prove<bf16, 64>(name + ", causal, window", c);
      c.causal = false, c.left = 3, c.right = 90;
      prove<bf16, 64>(name + ", window", c);
      c.left = -1, c.right = 2;
      prove<bf16, 64>(name + ", right window", c);
      c.left = 2000000000, c.right = 0;
      prove<bf16, 64>(name + ", wide window", c);
    }
}

void gates_sinks_and_scales() {
  SdpaCase c{.batch = 2, .heads_q = 3, .heads_kv = 1, .seqlen_q = 40, .seqlen_k = 100, .causal = true};
  for (Gate gate : {Gate::none, Gate::headwise, Gate::elementwise})
    for (bool wide : {false, true})
      for (bool sink : {false, true}) {
        c.gate = gate, c.float_gate = c.float_sink = wide, c.sink = sink;
        const std::string name = std::string("gate ") + std::to_string(int(gate)) + (wide ? ", float" : "") +
                                 (sink ? ", sink" : "");
        prove<bf16, 64>(name, c, {.grad_lse = sink});
        prove<f16, 256>(name + ", 256", c, {.grad_lse = !sink});
        prove<bf16, 80>(name + ", 80, no gradients", c, {.grad_gate = false, .grad_sink = false});
        prove<f16, 64>(name + ", ones", c, {.grad_out = GradOut::broadcast, .misaligned_gate = wide});
        prove<bf16, 96>(name + ", transposed", c, {.grad_out = GradOut::columns_apart, .misaligned_gate = wide});
        prove<bf16, 64>(name + ", misaligned", c, {.grad_out = GradOut::misaligned, .misaligned_gate = wide});
      }
  for (float scale : {0.0f, -0.125f, 3.0f, 1e-20f}) {
    c.scale = scale;
    prove<bf16, 64>("scale " + std::to_string(scale), c, {.grad_lse = true});
  }
  c.scale = -0.06f;
  prove<f16, 256>("scale -0.06, 256", c);
  c.scale = 0.5f, c.softcap = 2.0f;
  prove<bf16, 64, 64, true>("softcap", c, {.grad_lse = true}, true);
  prove<f16, 256, 256, true>("softcap, 256", c);
  c.scale = -0.5f, c.softcap = 50.0f;
  prove<bf16, 64, 64, true>("softcap 50", c);
}

void masks() {
  SdpaCase c{.batch = 2, .heads_q = 2, .seqlen_q = 70, .seqlen_k = 100, .mask = Mask::boolean};
  prove<bf16, 64, 64, false, Mask::boolean>("boolean mask", c, {.grad_lse = true}, true);
  c.causal = c.mask_per_head = true, c.left = 50;
  prove<bf16, 64, 64, false, Mask::boolean>("boolean mask of heads, window", c);
  prove<f16, 128, 128, false, Mask::boolean>("boolean mask of heads, window, 128", c);
  c.mask = Mask::floating;
  prove<bf16, 64, 64, false, Mask::floating>("floating mask", c, {.grad_lse = true});
  c.float_mask = true, c.sink = true;
  prove<bf16, 64, 64, false, Mask::floating>("floating mask of float", c, {}, true);
  prove<f16, 256, 256, false, Mask::floating>("floating mask of float, 256", c);
  c.softcap = 3;
  prove<bf16, 64, 64, true, Mask::floating>("floating mask of float, softcap", c);
  prove<bf16, 96, 96, true, Mask::floating>("floating mask of float, softcap, 96", c);
  c.float_mask = false;
  prove<bf16, 64, 64, true, Mask::floating>("lifting mask, softcap", c, {.lift = 3e4f});
  c.softcap = 0;
  prove<f16, 192, 192, false, Mask::floating>("lifting mask", c, {.lift = 3e4f});
}

// What a row does not see it does not feel, NaN and infinity included; the other rows do.
void hidden() {
  for (bool in_key : {false, true}) {
    SdpaCase c{.seqlen_q = 70, .seqlen_k = 100, .causal = true, .hidden_nan = 30, .nan_in_key = in_key};
    const std::string name = in_key ? "NaN in key and value" : "NaN in value";
    prove<bf16, 64>(name + ", causal", c);
    prove<f16, 64>(name + ", causal, f16", c);
    prove<f16, 192>(name + ", causal, f16, 192", c);
    c.causal = false, c.left = 20, c.right = 3;
    prove<bf16, 96>(name + ", window", c);
    c.left = c.right = -1, c.mask = Mask::boolean;
    prove<bf16, 64, 64, false, Mask::boolean>(name + ", boolean mask", c);
    c.mask = Mask::floating;
    prove<f16, 256, 256, false, Mask::floating>(name + ", floating mask", c);
    c.softcap = 4;
    prove<bf16, 64, 64, true, Mask::floating>(name + ", floating mask, softcap", c);
  }
  // An infinite key, which rows see that give it no weight.
  for (float far : {INFINITY, -INFINITY}) {
    const std::string name = "key of " + std::to_string(far);
    const BackwardCase more{.far_key = far, .far = 30};
    prove<bf16, 64>(name, {.seqlen_q = 70, .seqlen_k = 100}, more);
    prove<bf16, 64>(name + ", causal", {.seqlen_q = 70, .seqlen_k = 100, .causal = true}, more);
    prove<f16, 256>(name + ", causal, 256", {.seqlen_q = 70, .seqlen_k = 100, .causal = true}, more);
    prove<bf16, 64, 64, false, Mask::floating>(name + ", floating mask, sink",
                                               {.seqlen_q = 70, .seqlen_k = 100, .sink = true, .mask = Mask::floating},
                                               more);
    prove<bf16, 64, 64, true>(name + ", softcap", {.seqlen_q = 70, .seqlen_k = 100, .causal = true, .softcap = 5},
                              more);
  }
}

void packed_sequences() {
  SdpaCase c{.heads_q = 2, .seqlen_q = 200, .seqlen_k = 150, .causal = true, .bottom_right = true, .sink = true,
             .cu_q = {0, 70, 70, 71, 199, 200}, .cu_k = {0, 64, 80, 80, 149, 150}};
  prove<bf16, 64>("packed", c, {.grad_lse = true}, true);
  c.left = 10;
  prove<f16, 256>("packed, 256", c);
  c.cu_q = {0, 200}, c.cu_k = {0, 150};
  prove<bf16, 64>("packed, one", c);
  c.cu_q = {0, 0, 200, 200, 200}, c.cu_k = {0, 0, 150, 150, 150};
  prove<bf16, 64>("packed, most empty", c);
  c.cu_q = {3, 70, 180}, c.cu_k = {5, 60, 140};
  prove<bf16, 64>("packed, rows of none", c);
  c.gate = Gate::headwise;
  prove<bf16, 64>("packed, headwise", c);
  // Offsets that no caller should give: nothing outside of the tensors is touched, and it ends.
  const std::vector<int32_t> all_bad[] = {{-5, 1000}, {200, 0}, {100, 50, 2000000000}, {0, -2000000000, 200}};
  for (const std::vector<int32_t>& bad : all_bad) {
    GatedSdpaBackward<bf16> all{};
    GatedSdpa<bf16>& p = all.forward;
    std::vector<bf16> rows(200 * 64), scaled(rows.size()), out(rows.size());
    std::vector<float> numbers(200), norm(200), change(200), parts(16);
    GlobalMemory memory;
    p.batch = int(bad.size()) - 1, p.heads_q = p.heads_kv = 1, p.seqlen_q = p.seqlen_k = 200;
    p.query = p.key = p.value = all.grad_out = memory.input("rows", rows.data(), rows.size());
    p.out = const_cast<bf16*>(rows.data()), p.lse = const_cast<float*>(memory.input("lse", numbers.data(), 200));
    p.query_stride = p.key_stride = p.value_stride = p.out_stride = all.grad_out_stride = {0, 64, 64};
    all.grad_query_stride = p.query_stride, all.grad_out_stride_column = 1, p.lse_stride = {0, 200, 1};
    all.grad_query = memory.output("out", out.data(), out.size());
    all.scaled = memory.in_out("scaled", scaled.data(), scaled.size());
    all.norm = memory.in_out("norm", norm.data(), norm.size());
    all.change = memory.in_out("change", change.data(), change.size());
    all.sink_parts = memory.output("parts", parts.data(), parts.size());
    p.cu_seqlens_q = p.cu_seqlens_k = memory.input("cu_seqlens", bad.data(), bad.size());
    p.window_left = p.window_right = -1, p.scale = 1;
    using Kernel = GatedSdpaRows<bf16>;
    using Tiles = GatedSdpaDqTiles<bf16, 64, 64>;
    Options options;
    options.races = false;  // sequences that overlap write the same rows
    must_pass("bad offsets, rows", memory,
              {"gated_sdpa_rows", {unsigned(gated_sdpa_blocks<Kernel::kRows>(p))}, {Kernel::kThreads}},
              [&] { gated_sdpa_rows<bf16>(all, 64); }, options);
    must_pass("bad offsets, dq", memory,
              {"gated_sdpa_dq", {unsigned(gated_sdpa_blocks<Tiles::kRows>(p))}, {Tiles::kThreads}, Tiles::kSharedBytes},
              [&] { gated_sdpa_dq<bf16, 64, 64, false, Mask::none>(all); }, options);
  }
}

// Against differences of the forward in double: what is left is the rounding of out, dO and dS.
template <class T, bool kSoftcap, Mask kMask>
void against_definition(const char* name, const SdpaCase& c, const BackwardCase& more) {
  BackwardProblem<T, 64, 64, kSoftcap, kMask> problem(c, more);
  const bool rows = problem.run_rows({}).right, dq = problem.run_dq({}).right;
  CHECK(rows && dq, "%s", name);
  const double error = problem.difference_from_definition();
  CHECK(error < (std::is_same_v<T, bf16> ? 1e-2 : 1.5e-3), "%s: %g", name, error);
  std::printf("%s: %.2g of the gradient from the definition\n", name, error);
}
void definition() {
  SdpaCase c{.heads_q = 2, .heads_kv = 1, .seqlen_q = 40, .seqlen_k = 90, .causal = true, .bottom_right = true,
             .sink = true};
  against_definition<bf16, false, Mask::none>("definition, bf16", c, {.grad_lse = true});
  against_definition<f16, false, Mask::none>("definition, f16", c, {.grad_lse = true});
  c.gate = Gate::headwise, c.mask = Mask::floating, c.float_mask = true, c.softcap = 1.5f, c.scale = -0.3f;
  against_definition<f16, true, Mask::floating>("definition, mask and softcap", c, {.grad_lse = true});
}

void count_bytes() {
  const Counted all = prove<bf16, 64>("counted", {.heads_q = 2, .seqlen_q = 128, .seqlen_k = 192});
  const uint64_t row = 64 * sizeof(bf16), numbers = 4 * 2 * sizeof(float);  // four lanes take norm and change
  // q and dO once; keys and values once for each of two tiles of rows and two heads.
  CHECK(all.dq.global_read == 2 * 128 * (2 * row + numbers) + 2 * 2 * (2 * 192 * row));
  CHECK(all.dq.global_written == 2 * 128 * row);
  CHECK(all.dq.flops == 6ull * 2 * 128 * 192 * 64);
  CHECK(all.dq.barriers == 2 * 2 * 3);
  // dO, out and gate once, and lse by each lane of a row.
  CHECK(all.rows.global_read == 2 * 128 * (3 * row + 8 * sizeof(float)));
  CHECK(all.rows.global_written == 2 * 128 * (2 * row + 2 * sizeof(float)));
  std::printf("  global bytes read %llu, written %llu; shared read %llu, written %llu\n", 0ull + all.dq.global_read,
              0ull + all.dq.global_written, 0ull + all.dq.shared_read, 0ull + all.dq.shared_written);
  // Under a causal mask the first tile of rows sees one tile of keys, the second two; a window of 16 is in two of each.
  const emu::Counts causal = prove<bf16, 64>("counted, causal", {.seqlen_q = 128, .seqlen_k = 128, .causal = true}).dq;
  CHECK(causal.global_read == 128 * (2 * row + numbers) + 3 * 2 * 64 * row);
  // The eight warps see one or more parts of 32 keys: 1, 1, 2, 2, 3, 3, 4, 4.
  CHECK(causal.flops == 20ull * 6 * 16 * 32 * 64);
  const emu::Counts window =
      prove<bf16, 64>("counted, window", {.seqlen_q = 256, .seqlen_k = 256, .causal = true, .left = 16}).dq;
  CHECK(window.global_read == 256 * (2 * row + numbers) + (1 + 3 * 2) * 2 * 64 * row);
}

template <class T, int kD>
void flaws(const char* name) {
  constexpr int kKeys = GatedSdpaDqTiles<T, kD, kD>::kKeys;
  BackwardProblem<T, kD, kD, false, Mask::none> problem({.seqlen_q = 64, .seqlen_k = 3 * kKeys, .sink = true});
  CHECK(problem.run_rows({}).right, "%s", name);
  every_flaw_is_seen(name, [&](const Options& options) { return problem.run_dq(options); });
}
void flaws_of_rows() {
  BackwardProblem<bf16, 64, 64, false, Mask::none> problem({.seqlen_q = 40, .seqlen_k = 40, .sink = true});
  every_flaw_is_seen("rows", [&](const Options& options) { return problem.run_rows(options); });
}

}  // namespace

int main() {
  prove<bf16, 64>("plain", {.seqlen_q = 70, .seqlen_k = 130, .gate = Gate::none}, {}, true);
  prove<bf16, 64>("causal", {.seqlen_q = 130, .seqlen_k = 130, .causal = true}, {.grad_lse = true}, true);
  heads_and_types();
  tf32_numbers();
  lengths_and_positions();
  gates_sinks_and_scales();
  masks();
  hidden();
  packed_sequences();
  definition();
  count_bytes();
  flaws<bf16, 64>("rows in shared memory");
  flaws<f16, 80>("rows in registers");
  flaws<bf16, 256>("rows in shared memory, 256");
  flaws<tf32, 256>("one warp, tf32");
  flaws_of_rows();
  return check::result("emu gated_sdpa_dq");
}
