#include "access.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "block.h"

namespace nsk::emu {
namespace {

// Atomics by one thread that waits for nobody in between. Only a loop that waits for another thread has so many.
constexpr int kSpinning = 1 << 20;

const char* verb(Access access) {
  static const char* const verbs[] = {"reads", "writes", "atomically updates", "copies asynchronously to"};
  return verbs[int(access)];
}

std::string name(Space space, const void* p) {
  const Block& block = *running->block;
  return space == Space::shared ? block.shared.name(block.shared.offset(p)) : block.memory.name(p);
}

[[noreturn]] void fail_access(Fault fault, Space space, const void* p, size_t bytes, Access access) {
  const char* const why = fault == Fault::out_of_bounds ? "out of bounds"
                          : fault == Fault::misaligned  ? "misaligned"
                          : fault == Fault::read_only   ? "not its to write"
                                                        : "never written";
  fail(fault, "%s: %s %zu bytes at %s (address %p)", why, verb(access), bytes, name(space, p).c_str(), p);
}

[[noreturn]] void report_race(Access access, size_t bytes, const std::string& where, const Record& before) {
  static const char* const others[] = {"read it", "wrote it", "updated it atomically",
                                       "copies to it asynchronously and has not waited for that"};
  const Block& block = *running->block;
  std::string who = "thread " + std::to_string(before.warp * kWarpSize + std::countr_zero(before.lanes));
  if (before.block != block.number()) who += " of the launch's block number " + std::to_string(before.block);
  fail(Fault::race, "race: %s %zu bytes at %s, unordered with %s, which %s", verb(access), bytes, where.c_str(),
       who.c_str(), others[int(before.access)]);
}

// Calls enter(word, bytes of it) for each word of the bytes from `offset` on.
template <class Enter>
void each_word(size_t offset, size_t bytes, const Enter& enter) {
  for (size_t at = offset; at < offset + bytes;) {
    const size_t word = at / Shadow::kWord, first = at % Shadow::kWord;
    const size_t last = std::min(Shadow::kWord, first + (offset + bytes - at));
    enter(word, uint8_t((1u << last) - (1u << first)));
    at += last - first;
  }
}

// Enters the access into shadow memory. lanes_of(i): the lanes that access the i-th of its words.
template <class LanesOf>
void look_for_races(Space space, Shadow& shadow, size_t offset, size_t bytes, Access access, const void* p,
                    const LanesOf& lanes_of) {
  const Clocks& clocks = running->block->clocks;
  each_word(offset, bytes, [&](size_t word, uint8_t mask) {
    const uint32_t lanes = lanes_of(word - offset / Shadow::kWord);
    if (const Record* before = shadow.enter(word, clocks.stamp(running->warp, lanes, mask, access), clocks))
      report_race(access, bytes, name(space, p), *before);
  });
}

bool reads(Access access) { return access == Access::read || access == Access::atomic; }

template <class LanesOf>
void access_shared(const void* p, size_t bytes, size_t align, Access access, const LanesOf& lanes_of) {
  Block& block = *running->block;
  SharedMemory& shared = block.shared;
  Counts& counts = block.report.counts;
  const ptrdiff_t offset = shared.offset(p);
  if (!shared.inside(offset, bytes)) fail_access(Fault::out_of_bounds, Space::shared, p, bytes, access);
  if (uintptr_t(p) % align) fail_access(Fault::misaligned, Space::shared, p, bytes, access);
  if (reads(access)) {
    if (!shared.all_written(offset, bytes)) fail_access(Fault::unwritten, Space::shared, p, bytes, access);
    counts.shared_read += bytes;
  }
  if (access != Access::read) {
    // What a copy writes counts as written when it has arrived.
    if (access != Access::copy || block.options.arrival == Arrival::at_once)
      shared.mark(offset, bytes, SharedMemory::written);
    else if (block.options.arrival == Arrival::poisoned)
      shared.mark(offset, bytes, SharedMemory::unwritten);
    counts.shared_written += bytes;
  }
  if (block.options.races) look_for_races(Space::shared, block.shadow, size_t(offset), bytes, access, p, lanes_of);
}

void access_global(const void* p, size_t bytes, size_t align, Access access) {
  Block& block = *running->block;
  Counts& counts = block.report.counts;
  Region* region = block.memory.find(p);
  if (!region || !region->holds(p, bytes)) fail_access(Fault::out_of_bounds, Space::global, p, bytes, access);
  if (uintptr_t(p) % align) fail_access(Fault::misaligned, Space::global, p, bytes, access);
  const size_t offset = size_t(static_cast<const char*>(p) - region->begin);
  if (reads(access)) {
    if (!region->written.empty() && std::memchr(&region->written[offset], 0, bytes))
      fail_access(Fault::unwritten, Space::global, p, bytes, access);
    counts.global_read += bytes;
  }
  if (access != Access::read) {
    if (region->read_only) fail_access(Fault::read_only, Space::global, p, bytes, access);
    if (!region->written.empty()) std::memset(&region->written[offset], 1, bytes);
    counts.global_written += bytes;
  }
  if (block.options.races && !region->read_only)
    look_for_races(Space::global, region->shadow, offset, bytes, access, p, [](size_t) { return 1u << running->lane; });
}

}  // namespace

void access(Space space, const void* p, size_t bytes, size_t align, Access access) {
  if (space == Space::shared)
    access_shared(p, bytes, align, access, [](size_t) { return 1u << running->lane; });
  else
    access_global(p, bytes, align, access);
  if (access == Access::atomic) {
    if (++running->atomics == kSpinning)
      fail(Fault::deadlock, "spins at %s: a thread runs until it waits, so that nobody will end this",
           name(space, p).c_str());
    ++running->block->report.counts.atomics;
    running->block->clocks.atomic(running->id, uintptr_t(p));
  }
}

void read_until_now(const void* p, size_t bytes) {
  Region& region = *running->block->memory.find(p);
  if (running->block->options.races && !region.read_only)
    look_for_races(Space::global, region.shadow, size_t(static_cast<const char*>(p) - region.begin), bytes,
                   Access::read, p, [](size_t) { return 1u << running->lane; });
}

void access_row(const void* p, const uint32_t (&lanes)[4], Access access) {
  access_shared(p, 16, 16, access, [&](size_t word) { return lanes[word]; });
}

}  // namespace nsk::emu
