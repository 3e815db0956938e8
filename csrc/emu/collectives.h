// Barriers, shuffles and votes of the running thread.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>

namespace nsk::emu {

void sync_threads(std::source_location where);
void sync_barrier(int id, int count, std::source_location where);
void arrive_at_barrier(int id, int count, std::source_location where);
void sync_warp(uint32_t mask, std::source_location where);
void fence(std::source_location where);

enum class Shuffle : uint32_t { index, up, down, exclusive_or };
uint64_t shuffle_bits(Shuffle kind, uint32_t mask, uint64_t value, int by, int width, std::source_location where);

template <class T>
T shuffle(Shuffle kind, uint32_t mask, T value, int by, int width, std::source_location where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle_bits(kind, mask, bits, by, width, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

struct Vote {
  uint32_t ballot, lanes;  // those that said yes, and all that voted
};
Vote vote(uint32_t mask, bool yes, std::source_location where);

}  // namespace nsk::emu
