// What the emulator's tests share: a fault that must come, and flaws that must be seen.
#pragma once

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/emu/launch.h"
#include "../core/check.h"
#include "tf32.h"

namespace nsk::test {

using emu::Error, emu::Fault, emu::GlobalMemory, emu::Launch, emu::Options, emu::Report;

// `body` as a kernel must do wrong in this way, and the message must hold `words`.
template <class F>
void must_fail(const char* name, Fault fault, const char* words, GlobalMemory& memory, const Launch& what,
               const F& body, const Options& options = {}) {
  try {
    emu::launch(what, memory, options, body);
    CHECK(false, "%s: nothing was reported (%s)", name, options.name().c_str());
  } catch (const Error& e) {
    CHECK(e.fault == fault && std::string(e.what()).find(words) != std::string::npos, "%s (%s): %s", name,
          options.name().c_str(), e.what());
    CHECK(e.kernel == what.kernel && std::string(e.what()).starts_with(what.kernel + ": block ("), "%s: %s", name,
          e.what());
  }
}

template <class F>
void must_fail(const char* name, Fault fault, const char* words, unsigned threads, const F& body) {
  GlobalMemory memory;
  for (const Options& options : emu::all_schedules(1))
    must_fail(name, fault, words, memory, {name, {}, {threads}, 1024}, body, options);
}

template <class F>
Report must_pass(const char* name, GlobalMemory& memory, const Launch& what, const F& body,
                 const Options& options = {}) {
  try {
    return emu::launch(what, memory, options, body);
  } catch (const Error& e) {
    CHECK(false, "%s (%s): %s", name, options.name().c_str(), e.what());
    return {};
  }
}

template <class F>
void must_pass(const char* name, unsigned threads, const F& body) {
  GlobalMemory memory;
  for (const Options& options : emu::all_schedules(1))
    must_pass(name, memory, {name, {}, {threads}, 1024}, body, options);
}

struct Outcome {
  Report report;
  bool right;  // whether the results are
};

// run(options) runs a kernel. It must be right in every schedule; then each of its synchronisations is left out, one at
// a time, and every schedule must show it: by a fault or by wrong results.
template <class Run>
void every_flaw_is_seen(const char* name, const Run& run) {
  std::vector<emu::Sync> syncs;
  for (const Options& options : emu::all_schedules(7)) {
    try {
      const Outcome outcome = run(options);
      CHECK(outcome.right, "%s: wrong (%s)", name, options.name().c_str());
      syncs = outcome.report.syncs;
    } catch (const Error& e) {
      CHECK(false, "%s (%s): %s", name, options.name().c_str(), e.what());
    }
  }
  CHECK(!syncs.empty(), "%s", name);
  int flaws = 0;
  for (const emu::Sync& sync : syncs)
    for (auto kind : {emu::Flaw::left_out, emu::Flaw::one_less}) {
      if (kind == emu::Flaw::one_less && sync.kind != emu::SyncKind::wait) continue;
      ++flaws;
      std::string first;
      for (Options options : emu::all_schedules(7)) {
        options.flaw = emu::Flaw{kind, sync};
        try {
          const Outcome outcome = run(options);
          CHECK(!outcome.right, "%s: not seen: %s", name, options.name().c_str());
          if (first.empty()) first = "wrong results";
        } catch (const Error& e) {
          if (first.empty()) first = e.what();
        }
      }
      std::printf("  %s %s: %s\n", kind == emu::Flaw::left_out ? "without" : "one less at", sync.name().c_str(),
                  first.c_str());
    }
  std::printf("%s: %d flaws, all seen in every schedule\n", name, flaws);
}

inline std::vector<float> normal(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& x : values) x = distribution(random);
  return values;
}

// Words that so many lanes of a warp read or write at a time lie in different banks. The emulator counts conflicts of
// ldmatrix and stmatrix only. at(lane): the byte where the lane's begin.
template <class F>
void different_banks(const char* name, int lanes, int words, const F& at) {
  for (int first = 0; first < 32; first += lanes) {
    std::vector<int> banks;
    for (int lane = first; lane < first + lanes; ++lane)
      for (int word = 0; word < words; ++word) banks.push_back((at(lane) / 4 + word) % 32);
    std::sort(banks.begin(), banks.end());
    CHECK(std::adjacent_find(banks.begin(), banks.end()) == banks.end(), "%s, from lane %d", name, first);
  }
}

}  // namespace nsk::test
