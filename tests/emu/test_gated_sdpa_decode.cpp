// Gated attention's split-KV decode and the merge of its parts against their definition in double: heads, lengths,
// parts, masks, gates and types, every schedule, bytes against paper, and without each of its barriers, waits and
// commits.
#include "../../csrc/cuda/gated_sdpa_decode.cuh"
#include "gated_sdpa.h"

using namespace nsk;
using namespace nsk::test;

namespace {

// The two launches, with scratch of which every byte that is read must have been written.
template <class T, int kD, int kDv, bool kSoftcap, Mask kMask>
Outcome run(const SdpaProblem<T, kD, kDv, kSoftcap, kMask>& problem, int parts, const Options& options,
            emu::Counts* merged = nullptr) {
  return problem.run_with([&](const GatedSdpa<T>& p, GlobalMemory& memory) {
    GatedSdpaDecode<T> decode{p, parts, {}, {}, {}};
    const size_t rows = size_t(decode.rows()) * parts;
    std::vector<float> out(rows * kDv), top(rows), sum(rows);
    decode.part_out = memory.output("part_out", out.data(), out.size());
    decode.part_top = memory.output("part_top", top.data(), top.size());
    decode.part_sum = memory.output("part_sum", sum.data(), sum.size());
    using Tiles = GatedSdpaDecodeTiles<T, kD, kDv>;
    const Report report = emu::launch(
        {"gated_sdpa_decode", {unsigned(decode.blocks())}, {Tiles::kThreads}, Tiles::kSharedBytes}, memory, options,
        [&] { gated_sdpa_decode<T, kD, kDv, kSoftcap, kMask>(decode); });
    const GatedSdpaMerge<T> merge{decode, kDv};
    const Report of_merge = emu::launch(
        {"gated_sdpa_merge", {unsigned(merge.blocks())}, {GatedSdpaMergeTiles::kThreads}}, memory, options,
        [&] { gated_sdpa_merge<T>(merge); });
    if (merged) *merged = of_merge.counts;
    return report;
  });
}

template <class T, int kD, int kDv = kD, bool kSoftcap = false, Mask kMask = Mask::none>
emu::Counts prove(const char* name, const SdpaCase& c, int parts, bool all = false, emu::Counts* merged = nullptr) {
  const SdpaProblem<T, kD, kDv, kSoftcap, kMask> problem(c);
  emu::Counts counts;
  const std::vector<Options> schedules = all ? emu::all_schedules(3) : std::vector<Options>(1);
  for (const Options& options : schedules) {
    try {
      const Outcome outcome = run(problem, parts, options, merged);
      CHECK(outcome.right, "%s: wrong (%s)", name, options.name().c_str());
      counts = outcome.report.counts;
      CHECK(counts.bank_conflicts == 0, "%s: %llu", name, static_cast<unsigned long long>(counts.bank_conflicts));
    } catch (const Error& e) {
      CHECK(false, "%s (%s): %s", name, options.name().c_str(), e.what());
    }
  }
  std::printf("%s, %d parts: largest error %.2f of what is allowed\n", name, parts, problem.worst);
  return counts;
}

void heads_and_types() {
  const SdpaCase c{.batch = 2, .heads_q = 8, .heads_kv = 2, .seqlen_q = 3, .seqlen_k = 150, .causal = true,
                   .bottom_right = true, .sink = true};
  prove<bf16, 64>("bf16, 64", c, 2, true);
  prove<f16, 64>("f16, 64", c, 3);
  prove<bf16, 80>("bf16, 80", c, 2);
  prove<f16, 96>("f16, 96", c, 2);
  prove<bf16, 128>("bf16, 128", c, 2, true);
  prove<f16, 192>("f16, 192", c, 3);
  prove<bf16, 192, 128>("bf16, 192 and 128", c, 2);
  prove<bf16, 64, 128>("bf16, 64 and 128", c, 2);
  prove<f16, 256>("f16, 256", c, 4, true);
  prove<bf16, 256>("bf16, 256", {.seqlen_q = 1, .seqlen_k = 70, .scale = 0.06f}, 1);
}

// Rows of a group that are fewer than a tile's, just as many, and more; in tiles of one head and of several.
void tf32_numbers() {
  SdpaCase c{.batch = 2, .heads_q = 8, .heads_kv = 2, .seqlen_q = 3, .seqlen_k = 150, .causal = true,
             .bottom_right = true, .scale = -0.1f, .sink = true};
  prove<tf32, 64>("tf32, 64", c, 2, true);
  prove<tf32, 80>("tf32, 80", c, 2);
  prove<tf32, 128>("tf32, 128", c, 3);
  c.gate = Gate::headwise, c.hidden_nan = 149;
  prove<tf32, 192, 128>("tf32, 192 and 128, NaN", c, 2);
  prove<tf32, 256>("tf32, 256, NaN", c, 2, true);
  c.softcap = 2, c.mask = Mask::floating, c.float_mask = true;
  prove<tf32, 64, 64, true, Mask::floating>("tf32, floating mask, softcap, NaN", c, 2);
}

void rows_and_parts() {
  const int shapes[][3] = {{1, 1, 1}, {16, 1, 1}, {4, 4, 1}, {2, 1, 8}, {6, 2, 7}, {1, 1, 40}, {5, 1, 13}};
  for (const auto& [heads_q, heads_kv, sq] : shapes)
    for (int sk : {0, 1, 33, 300})
      for (int parts : {1, 2, 5}) {
        const std::string name = std::to_string(heads_q) + " heads, " + std::to_string(heads_kv) + " of keys, " +
                                 std::to_string(sq) + " rows, " + std::to_string(sk) + " keys";
        const SdpaCase c{.heads_q = heads_q, .heads_kv = heads_kv, .seqlen_q = sq, .seqlen_k = sk};
        prove<bf16, 64>(name.c_str(), c, parts);
      }
}

void positions() {
  const int lengths[][2] = {{1, 200}, {20, 200}, {20, 7}, {3, 0}};
  for (const auto& [sq, sk] : lengths)
    for (bool bottom_right : {false, true}) {
      const std::string name = std::to_string(sq) + " rows, " + std::to_string(sk) + " keys" +
                               (bottom_right ? ", bottom right" : "");
      SdpaCase c{.heads_q = 2, .heads_kv = 1, .seqlen_q = sq, .seqlen_k = sk, .bottom_right = bottom_right};
      c.causal = true;
      prove<bf16, 64>((name + ", causal").c_str(), c, 2);
      c.left = 40;
      prove<bf16, 64>((name + ", causal, window").c_str(), c, 3);
      c.causal = false, c.left = 3, c.right = 90;
      prove<bf16, 64>((name + ", window").c_str(), c, 2);
      c.left = -1, c.right = 2;
      prove<bf16, 64>((name + ", right window").c_str(), c, 2);
      c.left = 2000000000, c.right = 0;
      prove<bf16, 64>((name + ", wide window").c_str(), c, 2);
    }
}

void gates_sinks_and_scales() {
  SdpaCase c{.heads_q = 6, .heads_kv = 2, .seqlen_q = 4, .seqlen_k = 100, .causal = true, .bottom_right = true,
             .sink = true};
  for (Gate gate : {Gate::none, Gate::headwise, Gate::elementwise})
    for (bool wide : {false, true}) {
      c.gate = gate, c.float_gate = c.float_sink = wide, c.lse = !wide;
      const std::string name = std::string("gate ") + std::to_string(int(gate)) + (wide ? ", float" : "");
      prove<bf16, 64>(name.c_str(), c, 2);
    }
  for (float scale : {0.0f, -0.125f, 3.0f, 1e-20f}) {
    c.scale = scale;
    prove<bf16, 64>(("scale " + std::to_string(scale)).c_str(), c, 2);
  }
  c.scale = -0.06f;
  prove<f16, 256>("scale -0.06, 256", c, 2);
  c.scale = 0.5f, c.softcap = 2.0f;
  prove<bf16, 64, 64, true>("softcap", c, 2, true);
  c.scale = -0.5f, c.softcap = 50.0f;
  prove<bf16, 128, 128, true>("softcap 50", c, 2);
}

void masks() {
  SdpaCase c{.batch = 2, .heads_q = 2, .heads_kv = 1, .seqlen_q = 7, .seqlen_k = 100, .mask = Mask::boolean};
  prove<bf16, 64, 64, false, Mask::boolean>("boolean mask", c, 2, true);
  c.causal = c.mask_per_head = true, c.left = 50;
  prove<bf16, 64, 64, false, Mask::boolean>("boolean mask of heads, window", c, 3);
  c.mask = Mask::floating;
  prove<bf16, 64, 64, false, Mask::floating>("floating mask", c, 1);
  c.float_mask = true, c.sink = true;
  prove<bf16, 64, 64, false, Mask::floating>("floating mask of float", c, 2, true);
  prove<f16, 256, 256, false, Mask::floating>("floating mask of float, 256", c, 2);
  c.softcap = 3;
  prove<bf16, 64, 64, true, Mask::floating>("floating mask of float, softcap", c, 2);
  c.softcap = 0;
  for (float lift : {1e38f, -1e38f, -3.402823466e+38f}) {
    c.lift = lift;
    prove<bf16, 64, 64, false, Mask::floating>(("lifted " + std::to_string(lift)).c_str(), c, 2);
  }
}

// What a row does not see it does not feel, NaN and infinity included; the other rows do.
void hidden() {
  for (bool in_key : {false, true}) {
    SdpaCase c{.heads_q = 2, .heads_kv = 1, .seqlen_q = 40, .seqlen_k = 100, .causal = true, .hidden_nan = 30,
               .nan_in_key = in_key};
    prove<bf16, 64>("NaN, causal", c, 2);
    prove<f16, 64>("NaN, causal, f16", c, 1);
    c.causal = false, c.mask = Mask::boolean;
    prove<bf16, 64, 64, false, Mask::boolean>("NaN, boolean mask", c, 2);
    c.mask = Mask::floating;
    prove<f16, 256, 256, false, Mask::floating>("NaN, floating mask", c, 3);
  }
}

// Rows whose scores are all -inf, in some parts or in all, and rows that see nothing.
void minus_infinity_only() {
  for (bool sink : {false, true})
    for (int parts : {1, 4}) {
      SdpaCase c{.heads_q = 2, .heads_kv = 1, .seqlen_q = 50, .seqlen_k = 150, .causal = true, .sink = sink,
                 .infinite_keys = 40};
      prove<bf16, 64>("-inf, causal", c, parts);
      c.causal = false;
      prove<bf16, 64>("-inf in one part", c, parts);
      c.infinite_keys = 150;
      prove<bf16, 64>("-inf everywhere", c, parts);
      c.mask = Mask::boolean;
      prove<bf16, 64, 64, false, Mask::boolean>("-inf everywhere, boolean mask", c, parts);
      c.mask = Mask::floating, c.infinite_keys = 100;
      prove<f16, 128, 128, false, Mask::floating>("-inf, floating mask", c, parts);
    }
}

void count_bytes() {
  const uint64_t row = 128 * sizeof(bf16), wide = 128 * sizeof(float);
  emu::Counts merge;
  // 2 KV heads with 4 rows each, in 2 parts.
  const SdpaCase c{.heads_q = 8, .heads_kv = 2, .seqlen_q = 1, .seqlen_k = 256};
  const emu::Counts all = prove<bf16, 128>("counted", c, 2, false, &merge);
  // Keys and values once; the query once for each part.
  CHECK(all.global_read == 2 * 2 * 256 * row + 2 * 8 * row);
  CHECK(all.global_written == 2 * 8 * (wide + 2 * sizeof(float)));
  CHECK(all.flops == 4ull * 2 * 16 * 256 * 128);
  CHECK(all.barriers == 2 * 2 * 2);
  // Each of a row's 32 threads reads its top twice and its sum once; the gate is read by each as it is needed.
  CHECK(merge.global_read == 2 * 8 * (wide + 32 * 3 * sizeof(float)) + 8 * row);
  CHECK(merge.global_written == 8 * (row + sizeof(float)));
  // Of a window's keys no more than what they begin and end in.
  const emu::Counts window = prove<bf16, 128>(
      "counted, window", {.seqlen_q = 1, .seqlen_k = 1000, .causal = true, .bottom_right = true, .left = 99}, 2);
  CHECK(window.global_read == 2 * (1000 - 896) * row + 2 * row);
}

template <class T, int kD>
void flaws(const char* name) {
  using Tiles = GatedSdpaDecodeTiles<T, kD, kD>;
  const SdpaProblem<T, kD, kD, false, Mask::none> problem(
      {.heads_q = 2, .heads_kv = 1, .seqlen_q = 2, .seqlen_k = 3 * Tiles::kWarps * Tiles::kKeys});
  every_flaw_is_seen(name, [&](const Options& options) { return run(problem, 1, options); });
}

}  // namespace

int main() {
  prove<bf16, 64>("one row", {.seqlen_q = 1, .seqlen_k = 200}, 2, true);
  heads_and_types();
  tf32_numbers();
  rows_and_parts();
  positions();
  gates_sinks_and_scales();
  masks();
  hidden();
  minus_infinity_only();
  count_bytes();
  flaws<bf16, 64>("query in registers");
  flaws<f16, 256>("query in shared memory");
  flaws<tf32, 128>("two warps, tf32");
  return check::result("emu gated_sdpa_decode");
}
