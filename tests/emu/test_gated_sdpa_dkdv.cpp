// Gated attention's gradients of keys and values against their definition in double: heads, lengths, masks and types,
// every schedule, bytes against paper, and without each of the kernel's barriers, waits and commits.
#include "gated_sdpa_dkdv.h"

using namespace nsk;
using namespace nsk::test;

namespace {

template <class T, int kD, int kDv = kD, bool kSoftcap = false, Mask kMask = Mask::none>
using Problem = KeyGradientsProblem<T, kD, kDv, kSoftcap, kMask>;

template <Wanted kWanted, class Problem>
emu::Counts prove(const std::string& name, const Problem& problem, bool all = false) {
  emu::Counts counts;
  const std::vector<Options> schedules = all ? emu::all_schedules(3) : std::vector<Options>(1);
  for (const Options& options : schedules) {
    try {
      const Outcome outcome = problem.template run<kWanted>(options);
      CHECK(outcome.right, "%s: wrong (%s), error %.2f", name.c_str(), options.name().c_str(), problem.worst);
      counts = outcome.report.counts;
      CHECK(counts.bank_conflicts == 0, "%s: %llu", name.c_str(), 0ull + counts.bank_conflicts);
    } catch (const Error& e) {
      CHECK(false, "%s (%s): %s", name.c_str(), options.name().c_str(), e.what());
    }
  }
  std::printf("%s: largest error %.2f of what is allowed, %d not finite\n", name.c_str(), problem.worst,
              problem.not_finite);
  return counts;
}

// In one launch where both gradients fit into one, else in two.
template <class T, int kD, int kDv = kD, bool kSoftcap = false, Mask kMask = Mask::none>
void prove(const std::string& name, const KeyGradientsCase& c, bool all = false) {
  const Problem<T, kD, kDv, kSoftcap, kMask> problem(c);
  if constexpr (kKeyAndValueFit<T, kD, kDv>) {
    prove<Wanted::both>(name, problem, all);
  } else {
    prove<Wanted::key>(name + ", keys", problem, all);
    prove<Wanted::value>(name + ", values", problem, all);
  }
}

void heads_and_types() {
  const KeyGradientsCase ragged{.batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 150,
                                .causal = true, .bottom_right = true};
  prove<bf16, 64>("bf16, 64", ragged, true);
  prove<f16, 64>("f16, 64", ragged);
  prove<bf16, 80>("bf16, 80", ragged);
  prove<f16, 96>("f16, 96", ragged);
  prove<bf16, 128>("bf16, 128", ragged);
  prove<f16, 128>("f16, 128", {.heads_q = 3, .seqlen_q = 100, .seqlen_k = 70, .scale = 0.09f}, true);
  prove<bf16, 192>("bf16, 192", {.heads_q = 2, .seqlen_q = 70, .seqlen_k = 75, .scale = 0.07f});
  prove<bf16, 192, 128>("bf16, 192 and 128", {.heads_q = 2, .heads_kv = 2, .seqlen_q = 40, .seqlen_k = 70});
  prove<f16, 256>("f16, 256", {.seqlen_q = 65, .seqlen_k = 70, .causal = true, .scale = 0.06f}, true);
  prove<bf16, 256>("bf16, 256", {.heads_q = 2, .seqlen_q = 33, .seqlen_k = 130, .scale = 0.06f});
  const Problem<bf16, 64> problem(ragged);
  prove<Wanted::key>("bf16, 64, keys alone", problem);
  prove<Wanted::value>("bf16, 64, values alone", problem);
}

void tf32_numbers() {
  KeyGradientsCase c{.batch = 2, .heads_q = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 150, .causal = true,
                     .bottom_right = true, .scale = -0.1f};
  prove<tf32, 64>("tf32, 64", c, true);
  prove<tf32, 80>("tf32, 80", c);
  prove<tf32, 128>("tf32, 128", c);
  c.batch = 1, c.bad = Bad::scaled;
  prove<tf32, 192, 128>("tf32, 192 and 128, NaN", c);
  c.bad = Bad::query;
  prove<tf32, 256>("tf32, 256, NaN", c, true);
  c.softcap = 2, c.mask = Mask::floating;
  prove<tf32, 64, 64, true, Mask::floating>("tf32, floating mask, softcap, NaN", c);
}

void lengths_and_positions() {
  const int lengths[][2] = {{1, 1}, {1, 200}, {63, 65}, {64, 64}, {129, 1}, {65, 7}, {0, 3}, {100, 200}, {200, 100}};
  for (const auto& [sq, sk] : lengths)
    for (bool bottom_right : {false, true}) {
      const std::string name = std::to_string(sq) + " rows, " + std::to_string(sk) + " keys" +
                               (bottom_right ? ", bottom right" : "");
      KeyGradientsCase c{.heads_q = 2, .seqlen_q = sq, .seqlen_k = sk, .bottom_right = bottom_right};
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

void scales_and_softcaps() {
  KeyGradientsCase c{.heads_q = 3, .seqlen_q = 70, .seqlen_k = 100, .causal = true};
  for (float scale : {0.0f, -0.125f, 3.0f, 1e-20f}) {
    c.scale = scale;
    prove<bf16, 64>("scale " + std::to_string(scale), c);
  }
  c.scale = -0.06f;
  prove<f16, 256>("scale -0.06, 256", c);
  c.scale = 0.5f, c.softcap = 2.0f;
  prove<bf16, 64, 64, true>("softcap", c, true);
  prove<f16, 128, 128, true>("softcap, 128", c);
  c.scale = -0.5f, c.softcap = 50.0f;
  prove<bf16, 64, 64, true>("softcap 50", c);
}

void masks() {
  KeyGradientsCase c{.batch = 2, .heads_q = 2, .seqlen_q = 70, .seqlen_k = 100, .mask = Mask::boolean};
  prove<bf16, 64, 64, false, Mask::boolean>("boolean mask", c, true);
  c.mask_of_keys = true;
  prove<bf16, 64, 64, false, Mask::boolean>("boolean mask of keys", c);
  c.mask_of_keys = false;
  c.causal = c.mask_per_head = true, c.left = 50;
  prove<bf16, 64, 64, false, Mask::boolean>("boolean mask of heads, window", c);
  c.mask = Mask::floating;
  prove<bf16, 64, 64, false, Mask::floating>("floating mask", c);
  c.float_mask = true;
  prove<bf16, 64, 64, false, Mask::floating>("floating mask of float", c, true);
  c.lift = 1000;
  prove<bf16, 64, 64, false, Mask::floating>("floating mask of 1000", c);
  c.mask_per_head = false, c.mask_of_keys = true, c.seqlen_q = 130;
  prove<f16, 64, 64, false, Mask::floating>("floating mask of keys", c);
  c.mask_of_keys = false, c.seqlen_q = 70;
  c.lift = 0;
  prove<f16, 256, 256, false, Mask::floating>("floating mask of float, 256", c);
  c.softcap = 3;
  prove<bf16, 80, 80, true, Mask::floating>("floating mask of float, softcap", c);
}

// A key does not feel what rows hold that do not see it, NaN and infinity included; the other keys do.
void hidden() {
  const char* const names[] = {"nothing", "query", "scaled", "key", "value"};
  for (Bad bad : {Bad::query, Bad::scaled, Bad::key, Bad::value}) {
    const std::string name = std::string("NaN in ") + names[int(bad)];
    KeyGradientsCase c{.seqlen_q = 70, .seqlen_k = 100, .causal = true, .bad = bad};
    prove<bf16, 64>(name + ", causal", c);
    prove<f16, 96>(name + ", causal, f16", c);
    prove<bf16, 256>(name + ", causal, 256", c);
    c.softcap = 5;
    prove<bf16, 64, 64, true>(name + ", causal, softcap", c);
    c.softcap = 0;
    c.causal = false, c.mask = Mask::boolean;
    prove<bf16, 64, 64, false, Mask::boolean>(name + ", boolean mask", c);
    c.mask = Mask::floating;
    prove<f16, 256, 256, false, Mask::floating>(name + ", floating mask", c);
    prove<bf16, 128, 128, false, Mask::floating>(name + ", floating mask, 128", c);
    c.mask = Mask::none, c.left = 10, c.right = 3;
    prove<bf16, 64>(name + ", window", c);
  }
}

void packed_sequences() {
  KeyGradientsCase c{.heads_q = 4, .heads_kv = 2, .seqlen_q = 200, .seqlen_k = 150, .causal = true,
                     .bottom_right = true, .cu_q = {0, 70, 70, 71, 199, 200}, .cu_k = {0, 64, 80, 80, 149, 150}};
  prove<bf16, 64>("packed", c, true);
  c.left = 10;
  prove<f16, 256>("packed, 256", c);
  c.cu_q = {0, 200}, c.cu_k = {0, 150};
  prove<bf16, 64>("packed, one", c);
  c.cu_q = {0, 0, 200, 200, 200}, c.cu_k = {0, 0, 150, 150, 150};
  prove<bf16, 64>("packed, most empty", c);
  c.cu_q = {3, 100, 180}, c.cu_k = {5, 80, 140};
  prove<bf16, 64>("packed, rows of no sequence", c);
  // Offsets that no caller should give: nothing outside of the tensors is touched, and it ends.
  const std::vector<int32_t> all_bad[] = {{-5, 1000}, {200, 0}, {100, 50, 2000000000}, {0, -2000000000, 200}};
  for (const std::vector<int32_t>& bad : all_bad) {
    GatedSdpaBackward<bf16> g{};
    GatedSdpa<bf16>& p = g.forward;
    std::vector<bf16> rows(200 * 64), dk(rows.size()), dv(rows.size());
    std::vector<float> numbers(200);
    GlobalMemory memory;
    p.batch = int(bad.size()) - 1, p.heads_q = p.heads_kv = 1, p.seqlen_q = p.seqlen_k = 200;
    p.query = p.key = p.value = memory.input("rows", rows.data(), rows.size());
    p.query_stride = p.key_stride = p.value_stride = g.grad_key_stride = g.grad_value_stride = {0, 64, 64};
    g.grad_key = memory.output("dk", dk.data(), dk.size()), g.grad_value = memory.output("dv", dv.data(), dv.size());
    g.scaled = const_cast<bf16*>(memory.input("scaled", rows.data(), rows.size()));
    g.norm = g.change = const_cast<float*>(memory.input("numbers", numbers.data(), numbers.size()));
    p.cu_seqlens_q = p.cu_seqlens_k = memory.input("cu_seqlens", bad.data(), bad.size());
    p.window_left = p.window_right = -1, p.scale = 1;
    using Tiles = GatedSdpaKeyTiles<bf16, 64, 64, Wanted::both>;
    Options options;
    options.races = false;  // sequences that overlap write the same rows
    must_pass("bad offsets", memory,
              {"gated_sdpa_dkdv", {unsigned(gated_sdpa_key_blocks<Tiles::kKeys>(p))}, {Tiles::kThreads},
               Tiles::kSharedBytes},
              [&] { gated_sdpa_dkdv<bf16, 64, 64, false, Mask::none, Wanted::both>(g); }, options);
  }
}

void count_bytes() {
  const uint64_t row = 64 * sizeof(bf16), pair = 2 * row, rows = 2 * (row + sizeof(float));
  // Keys and values once; queries, scaled and two numbers a row once for each of three tiles of keys and two heads.
  const emu::Counts all = prove<Wanted::both>(
      "counted", Problem<bf16, 64>({.heads_q = 2, .seqlen_q = 128, .seqlen_k = 192}));
  CHECK(all.global_read == 192 * pair + 3 * 2 * 128 * rows);
  CHECK(all.global_written == 192 * pair);
  CHECK(all.flops == 4ull * 2 * 2 * 128 * 192 * 64);
  CHECK(all.barriers == 3 * 2 * 2);
  std::printf("  global bytes read %llu, written %llu; shared read %llu, written %llu\n", 0ull + all.global_read,
              0ull + all.global_written, 0ull + all.shared_read, 0ull + all.shared_written);
  // Under a causal mask the first tile of keys is seen by two tiles of rows, the second by one; with a window of 16,
  // three of four are seen by two.
  const emu::Counts causal = prove<Wanted::both>(
      "counted, causal", Problem<bf16, 64>({.seqlen_q = 128, .seqlen_k = 128, .causal = true}));
  CHECK(causal.global_read == 128 * pair + 3 * 64 * rows);
  const emu::Counts window = prove<Wanted::both>(
      "counted, window", Problem<bf16, 64>({.seqlen_q = 256, .seqlen_k = 256, .causal = true, .left = 16}));
  CHECK(window.global_read == 256 * pair + (3 * 2 + 1) * 64 * rows);
  // Keys that nobody sees cost nothing but their zeros.
  const emu::Counts unseen = prove<Wanted::both>(
      "counted, unseen", Problem<bf16, 64>({.seqlen_q = 64, .seqlen_k = 256, .causal = true}));
  CHECK(unseen.global_read == 64 * pair + 64 * rows);
  CHECK(unseen.global_written == 256 * pair);
}

template <Wanted kWanted, class T, int kD>
void flaws(const char* name) {
  constexpr int kRows = GatedSdpaKeyTiles<T, kD, kD, kWanted>::kRows;
  const Problem<T, kD> problem({.seqlen_q = 3 * kRows, .seqlen_k = 64});
  every_flaw_is_seen(name, [&](const Options& options) { return problem.template run<kWanted>(options); });
}

}  // namespace

int main() {
  prove<bf16, 64>("causal", {.seqlen_q = 130, .seqlen_k = 130, .causal = true}, true);
  heads_and_types();
  tf32_numbers();
  lengths_and_positions();
  scales_and_softcaps();
  masks();
  hidden();
  packed_sequences();
  count_bytes();
  flaws<Wanted::both, bf16, 64>("both gradients");
  flaws<Wanted::key, bf16, 256>("keys alone");
  flaws<Wanted::value, bf16, 256>("values alone");
  flaws<Wanted::key, tf32, 256>("keys alone, one warp, tf32");
  return check::result("emu gated_sdpa_dkdv");
}
