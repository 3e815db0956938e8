// Gated attention's forward kernel against its definition in double: heads, lengths, masks, gates and types, every
// schedule, bytes against paper, and without each of its barriers, waits and commits.
#include "gated_sdpa.h"

using namespace nsk;
using namespace nsk::test;

namespace {

template <class T, int kD, int kDv = kD, bool kSoftcap = false, Mask kMask = Mask::none>
emu::Counts prove(const char* name, const SdpaCase& c, bool all = false) {
  const SdpaProblem<T, kD, kDv, kSoftcap, kMask> problem(c);
  emu::Counts counts;
  const std::vector<Options> schedules = all ? emu::all_schedules(3) : std::vector<Options>(1);
  for (const Options& options : schedules) {
    try {
      const Outcome outcome = problem.run(options);
      CHECK(outcome.right, "%s: wrong (%s)", name, options.name().c_str());
      counts = outcome.report.counts;
      CHECK(counts.bank_conflicts == 0, "%s: %llu", name, static_cast<unsigned long long>(counts.bank_conflicts));
    } catch (const Error& e) {
      CHECK(false, "%s (%s): %s", name, options.name().c_str(), e.what());
    }
  }
  std::printf("%s: largest error %.2f of what is allowed\n", name, problem.worst);
  return counts;
}

void heads_and_types() {
  const SdpaCase ragged{.batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 150, .causal = true,
                        .bottom_right = true};
  prove<bf16, 64>("bf16, 64", ragged, true);
  prove<f16, 64>("f16, 64", ragged);
  prove<bf16, 80>("bf16, 80", ragged);
  prove<f16, 96>("f16, 96", ragged);
  prove<bf16, 128>("bf16, 128", ragged);
  prove<bf16, 192>("bf16, 192", {.heads_q = 2, .seqlen_q = 33, .seqlen_k = 75, .scale = 0.07f});
  prove<f16, 256>("f16, 256", {.seqlen_q = 65, .seqlen_k = 70, .causal = true, .scale = 0.06f}, true);
  prove<bf16, 192, 128>("bf16, 192 and 128", {.heads_q = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 70});
  prove<bf16, 64, 128>("bf16, 64 and 128", {.seqlen_q = 40, .seqlen_k = 100}, true);
}

void tf32_numbers() {
  SdpaCase c{.batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 150, .causal = true,
             .bottom_right = true, .scale = -0.1f, .sink = true};
  prove<tf32, 64>("tf32, 64", c, true);
  prove<tf32, 80>("tf32, 80", c);
  prove<tf32, 128>("tf32, 128", c);
  c.gate = Gate::headwise, c.hidden_nan = 20;
  prove<tf32, 192, 128>("tf32, 192 and 128, NaN", c);
  prove<tf32, 256>("tf32, 256, NaN", c, true);
  c.softcap = 2, c.mask = Mask::floating, c.float_mask = true;
  prove<tf32, 64, 64, true, Mask::floating>("tf32, floating mask, softcap, NaN", c);
}

void lengths_and_positions() {
  const int lengths[][2] = {{1, 1}, {1, 200}, {63, 65}, {64, 64}, {129, 1}, {65, 7}, {3, 0}, {100, 200}, {200, 100}};
  for (const auto& [sq, sk] : lengths)
    for (bool bottom_right : {false, true}) {
      const std::string name = std::to_string(sq) + " rows, " + std::to_string(sk) + " keys" +
                               (bottom_right ? ", bottom right" : "");
      SdpaCase c{.heads_q = 2, .seqlen_q = sq, .seqlen_k = sk, .bottom_right = bottom_right};
      prove<bf16, 64>((name + ", all").c_str(), c);
      c.causal = true;
      prove<bf16, 64>((name + ", causal").c_str(), c);
      c.left = 40;
      prove<bf16, 64>((name + ", causal, window").c_str(), c);
      c.causal = false, c.left = 3, c.right = 90;
      prove<bf16, 64>((name + ", window").c_str(), c);
      c.left = -1, c.right = 2;
      prove<bf16, 64>((name + ", right window").c_str(), c);
      c.left = 2000000000, c.right = 0;
      prove<bf16, 64>((name + ", wide window").c_str(), c);
    }
}

void gates_sinks_and_scales() {
  SdpaCase c{.heads_q = 3, .heads_kv = 1, .seqlen_q = 70, .seqlen_k = 100, .causal = true, .sink = true};
  for (Gate gate : {Gate::none, Gate::headwise, Gate::elementwise})
    for (bool wide : {false, true}) {
      c.gate = gate, c.float_gate = c.float_sink = wide, c.lse = !wide;
      const std::string name = std::string("gate ") + std::to_string(int(gate)) + (wide ? ", float" : "");
      prove<bf16, 64>(name.c_str(), c);
      prove<f16, 256>((name + ", 256").c_str(), c);
    }
  for (float scale : {0.0f, -0.125f, 3.0f, 1e-20f}) {
    c.scale = scale;
    prove<bf16, 64>(("scale " + std::to_string(scale)).c_str(), c);
  }
  c.scale = -0.06f;
  prove<f16, 256>("scale -0.06, 256", c);
  c.scale = 0.5f, c.softcap = 2.0f;
  prove<bf16, 64, 64, true>("softcap", c, true);
  c.scale = -0.5f, c.softcap = 50.0f;
  prove<bf16, 64, 64, true>("softcap 50", c);
}

void masks() {
  SdpaCase c{.batch = 2, .heads_q = 2, .seqlen_q = 70, .seqlen_k = 100, .mask = Mask::boolean};
  prove<bf16, 64, 64, false, Mask::boolean>("boolean mask", c, true);
  c.causal = c.mask_per_head = true, c.left = 50;
  prove<bf16, 64, 64, false, Mask::boolean>("boolean mask of heads, window", c);
  c.mask = Mask::floating;
  prove<bf16, 64, 64, false, Mask::floating>("floating mask", c);
  c.float_mask = true, c.sink = true;
  prove<bf16, 64, 64, false, Mask::floating>("floating mask of float", c, true);
  prove<f16, 256, 256, false, Mask::floating>("floating mask of float, 256", c);
  c.softcap = 3;
  prove<bf16, 64, 64, true, Mask::floating>("floating mask of float, softcap", c);
  c.softcap = 0;
  for (float lift : {1e38f, -1e38f, -3.402823466e+38f}) {
    c.lift = lift;
    prove<bf16, 64, 64, false, Mask::floating>(("lifted " + std::to_string(lift)).c_str(), c);
  }
}

// What a row does not see it does not feel, NaN and infinity included; the other rows do.
void hidden() {
  for (bool in_key : {false, true}) {
    SdpaCase c{.seqlen_q = 70, .seqlen_k = 100, .causal = true, .hidden_nan = 30, .nan_in_key = in_key};
    prove<bf16, 64>("NaN, causal", c);
    prove<f16, 64>("NaN, causal, f16", c);
    c.causal = false, c.mask = Mask::boolean;
    prove<bf16, 64, 64, false, Mask::boolean>("NaN, boolean mask", c);
    c.mask = Mask::floating;
    prove<f16, 256, 256, false, Mask::floating>("NaN, floating mask", c);
  }
}

// Rows whose scores are all -inf, and rows that see nothing.
void minus_infinity_only() {
  for (bool sink : {false, true}) {
    SdpaCase c{.heads_q = 2, .heads_kv = 1, .seqlen_q = 70, .seqlen_k = 100, .causal = true, .sink = sink,
               .infinite_keys = 30};
    prove<bf16, 64>("-inf, causal", c);
    c.infinite_keys = 100;
    prove<bf16, 64>("-inf everywhere", c);
    c.mask = Mask::boolean;
    prove<bf16, 64, 64, false, Mask::boolean>("-inf everywhere, boolean mask", c);
    c.mask = Mask::floating, c.infinite_keys = 70;
    prove<f16, 256, 256, false, Mask::floating>("-inf, floating mask", c);
  }
}

void packed_sequences() {
  SdpaCase c{.heads_q = 2, .seqlen_q = 200, .seqlen_k = 150, .causal = true, .bottom_right = true,
             .cu_q = {0, 70, 70, 71, 199, 200}, .cu_k = {0, 64, 80, 80, 149, 150}};
  prove<bf16, 64>("packed", c, true);
  c.left = 10;
  prove<f16, 256>("packed, 256", c);
  c.cu_q = {0, 200}, c.cu_k = {0, 150};
  prove<bf16, 64>("packed, one", c);
  c.cu_q = {0, 0, 200, 200, 200}, c.cu_k = {0, 0, 150, 150, 150};
  prove<bf16, 64>("packed, most empty", c);
  // Offsets that no caller should give: nothing outside of the tensors is touched, and it ends.
  const std::vector<int32_t> all_bad[] = {{-5, 1000}, {200, 0}, {100, 50, 2000000000}, {0, -2000000000, 200}};
  for (const std::vector<int32_t>& bad : all_bad) {
    GatedSdpa<bf16> p{};
    std::vector<bf16> rows(200 * 64), out(rows.size());
    GlobalMemory memory;
    p.batch = int(bad.size()) - 1, p.heads_q = p.heads_kv = 1, p.seqlen_q = p.seqlen_k = 200;
    p.query = p.key = p.value = memory.input("rows", rows.data(), rows.size());
    p.query_stride = p.key_stride = p.value_stride = p.out_stride = {0, 64, 64};
    p.out = memory.output("out", out.data(), out.size());
    p.cu_seqlens_q = p.cu_seqlens_k = memory.input("cu_seqlens", bad.data(), bad.size());
    p.window_left = p.window_right = -1, p.scale = 1;
    using Tiles = GatedSdpaTiles<bf16, 64, 64>;
    Options options;
    options.races = false;  // sequences that overlap write the same rows
    must_pass("bad offsets", memory,
              {"gated_sdpa_forward", {unsigned(gated_sdpa_blocks<Tiles::kRows>(p))}, {Tiles::kThreads},
               Tiles::kSharedBytes},
              [&] { gated_sdpa_forward<bf16, 64, 64, false, Mask::none>(p); }, options);
  }
}

void count_bytes() {
  const emu::Counts all = prove<bf16, 64>("counted", {.heads_q = 2, .seqlen_q = 128, .seqlen_k = 192});
  const uint64_t row = 64 * sizeof(bf16);
  // Query and gate once; keys and values once for each of two tiles of rows and two heads.
  CHECK(all.global_read == 2 * (2 * 128 * row) + 2 * 2 * (2 * 192 * row));
  CHECK(all.global_written == 2 * 128 * (row + sizeof(float)));
  CHECK(all.flops == 4ull * 2 * 128 * 192 * 64);
  CHECK(all.barriers == 2 * 2 * 3);
  CHECK(all.copies == all.global_read / 16);
  std::printf("  global bytes read %llu, written %llu; shared read %llu, written %llu\n", 0ull + all.global_read,
              0ull + all.global_written, 0ull + all.shared_read, 0ull + all.shared_written);
  // Under a causal mask the first tile of rows sees one tile of keys, the second two; a window of 16 is in two of each.
  const emu::Counts causal = prove<bf16, 64>("counted, causal", {.seqlen_q = 128, .seqlen_k = 128, .causal = true});
  CHECK(causal.global_read == 2 * 128 * row + 3 * 2 * 64 * row);
  const emu::Counts window = prove<bf16, 64>(
      "counted, window", {.seqlen_q = 256, .seqlen_k = 256, .causal = true, .left = 16});
  CHECK(window.global_read == 2 * 256 * row + (1 + 3 * 2) * 2 * 64 * row);
  const emu::Counts wide = prove<tf32, 64>("counted, tf32", {.heads_q = 2, .seqlen_q = 128, .seqlen_k = 192});
  CHECK(wide.global_read == 2 * all.global_read && wide.flops == all.flops && wide.barriers == all.barriers);
  CHECK(wide.global_written == 2 * 128 * (2 * row + sizeof(float)));
}

// Single numbers and pairs of tiles of 32-bit numbers; at 80 columns two rows share a bank.
template <int kD>
void prove_banks() {
  for (int n = 0; n < kD / 8; ++n)
    for (int i = 0; i < 2; ++i) {
      different_banks("transposed", 32, 1, [&](int lane) { return TransposedReader<tf32, kD>(lane).at(i, 8, n); });
      different_banks("pairs", 16, 2, [&](int lane) { return Tile<tf32, kD>::pair_at(lane / 4 + 8 * i, n, lane); });
    }
}

template <class T, int kD>
void flaws(const char* name) {
  constexpr int kKeys = GatedSdpaTiles<T, kD, kD>::kKeys;
  const SdpaProblem<T, kD, kD, false, Mask::none> problem({.seqlen_q = 64, .seqlen_k = 3 * kKeys});
  every_flaw_is_seen(name, [&](const Options& options) { return problem.run(options); });
}

}  // namespace

int main() {
  prove<bf16, 64>("causal", {.seqlen_q = 130, .seqlen_k = 130, .causal = true}, true);
  heads_and_types();
  tf32_numbers();
  lengths_and_positions();
  gates_sinks_and_scales();
  masks();
  hidden();
  minus_infinity_only();
  packed_sequences();
  count_bytes();
  prove_banks<64>();
  prove_banks<96>();
  prove_banks<256>();
  flaws<bf16, 64>("query in registers");
  flaws<bf16, 256>("query in shared memory");
  flaws<tf32, 256>("two warps, tf32");
  return check::result("emu gated_sdpa");
}
