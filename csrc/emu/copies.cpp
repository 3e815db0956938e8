#include "copies.h"

#include <cstring>

#include "access.h"
#include "block.h"

namespace nsk::emu {
namespace {

void move_data(const Copy& copy) {
  if (copy.valid) std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(copy.to + copy.valid, 0, size_t(copy.bytes - copy.valid));
}

void arrive(const Copy& copy) {
  Block& block = *running->block;
  const ptrdiff_t offset = block.shared.offset(copy.to);
  if (copy.valid) read_until_now(copy.from, copy.valid);
  if (block.options.arrival != Arrival::at_once) move_data(copy);
  block.shared.mark(offset, copy.bytes, SharedMemory::written);
  if (!block.options.races) return;
  const Record now = block.clocks.stamp(running->warp, 1u << running->lane, 0xf, Access::write);
  for (size_t at = 0; at < copy.bytes; at += Shadow::kWord)
    block.shadow.settle((size_t(offset) + at) / Shadow::kWord, now);
}

// The groups before `end` have arrived.
void arrive_before(uint64_t end) {
  auto& copies = running->copies;
  size_t n = 0;
  while (n < copies.size() && copies[n].group < end) arrive(copies[n++]);
  copies.erase(copies.begin(), copies.begin() + ptrdiff_t(n));
}

}  // namespace

void issue_copy(void* to, const void* from, size_t bytes, size_t valid) {
  Block& block = *running->block;
  if (valid > bytes) fail(Fault::bad_argument, "cp.async of %zu bytes is asked for %zu", bytes, valid);
  const Copy copy{static_cast<char*>(to), from, uint8_t(bytes), uint8_t(valid), running->groups};
  if (uintptr_t(from) % bytes && valid)
    fail(Fault::misaligned, "misaligned: cp.async of %zu bytes from %s", bytes, block.memory.name(from).c_str());
  if (valid) access(Space::global, from, valid, 1, Access::read);
  access(Space::shared, to, bytes, bytes, Access::copy);
  ++block.report.counts.copies;
  if (block.options.arrival == Arrival::at_once) move_data(copy);
  if (block.options.arrival == Arrival::poisoned) std::memset(to, 0xff, bytes);
  running->copies.push_back(copy);
}

void commit_copies(std::source_location where) {
  if (running->block->at(SyncKind::commit, where)) ++running->groups;
}

void wait_copies(uint64_t groups, std::source_location where) {
  bool less = false;
  if (!running->block->at(SyncKind::wait, where, &less)) return;
  if (less) ++groups;
  if (running->groups > groups) arrive_before(running->groups - groups);
}

void wait_all_copies(std::source_location where) {
  bool less = false;
  if (!running->block->at(SyncKind::wait, where, &less)) return;
  arrive_before(running->groups + (less ? 0 : 1));
}

}  // namespace nsk::emu
