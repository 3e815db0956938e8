// What a launch is told, and what it tells: schedules, arrival of asynchronous copies, synchronisations that are left
// out, and counts.
#pragma once

#include <cstdint>
#include <optional>
#include <source_location>
#include <string>
#include <vector>

namespace nsk::emu {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr uint64_t count() const { return uint64_t(x) * y * z; }
};

// Which thread runs next when one has to wait.
enum class Order {
  greedy,       // a warp runs until all its threads wait for others; warps in shuffled order: the furthest apart
  round_robin,  // in turn: the closest together
  random,
};

// When the data of a cp.async lands in shared memory. The hardware may do any of these.
enum class Arrival {
  at_once,   // as early as can be: a copy that is issued too early overwrites what others still read
  late,      // at the wait: a missing wait reads what was there before
  poisoned,  // NaN at once, data at the wait
};

enum class SyncKind { barrier, warp_barrier, commit, wait, fence };

// One place in a kernel's source that orders something.
struct Sync {
  SyncKind kind;
  std::source_location where;

  bool operator==(const Sync& other) const;
  std::string name() const;  // e.g. "__syncwarp at gemm.cuh:120"
};

// A flaw put into a kernel without touching its source: what is done at one place is left out, or, for a wait, done
// for one group less.
struct Flaw {
  enum Kind { left_out, one_less } kind;
  Sync sync;
};

struct Options {
  Order order = Order::greedy;
  Arrival arrival = Arrival::poisoned;
  uint64_t seed = 0;
  bool races = true;  // whether the race detector looks on
  std::optional<Flaw> flaw;

  std::string name() const;  // e.g. "greedy, poisoned, seed 3"
};

// All orders with all arrivals.
std::vector<Options> all_schedules(uint64_t seed);

// Bytes are those that the kernel asked for: a value read twice counts twice.
struct Counts {
  uint64_t global_read = 0, global_written = 0, shared_read = 0, shared_written = 0;
  uint64_t mma = 0, flops = 0;  // flops: of mma, 2 per multiplication and addition
  uint64_t ldmatrix = 0, stmatrix = 0;
  uint64_t bank_conflicts = 0;  // of ldmatrix and stmatrix: passes beyond one for each 8x8 matrix
  uint64_t barriers = 0, warp_barriers = 0, copies = 0, atomics = 0, shuffles = 0;
};

struct Report {
  Counts counts;
  std::vector<Sync> syncs;  // every place that synchronised, in the order of its first time
};

}  // namespace nsk::emu
