#include "scheduler.h"

#include <bit>
#include <utility>

namespace nsk::emu {
namespace {

// The first set bit at or after `start`, going round.
int bit_from(uint32_t bits, int start) { return (std::countr_zero(std::rotr(bits, start)) + start) % 32; }

}  // namespace

void Scheduler::begin(int threads, Order order, uint64_t seed) {
  order_ = order;
  state_ = seed;
  const int warps = (threads + kWarpSize - 1) / kWarpSize;
  line_.resize(warps);
  warps_ = 0;
  for (int warp = 0; warp < warps; ++warp) line_[warp] = warp, ready_[warp] = 0;
  for (int thread = 0; thread < threads; ++thread) wake(thread);
  shuffle();
}

void Scheduler::wait(int thread) {
  const int warp = thread / kWarpSize;
  ready_[warp] &= ~(1u << thread % kWarpSize);
  if (!ready_[warp]) warps_ &= ~(1u << warp);
}

void Scheduler::wake(int thread) {
  ready_[thread / kWarpSize] |= 1u << thread % kWarpSize;
  warps_ |= 1u << thread / kWarpSize;
}

int Scheduler::next(int current) {
  if (order_ == Order::greedy) return greedy();
  int warp, start;
  if (order_ == Order::random) {
    const uint64_t r = random();
    warp = bit_from(warps_, r % 32);
    start = r / 32 % 32;
  } else {
    const int after = (current + 1) % kMaxThreads;
    warp = after / kWarpSize, start = after % kWarpSize;
    const uint32_t rest = ready_[warp] >> start << start;
    if (rest) return warp * kWarpSize + std::countr_zero(rest);
    warp = bit_from(warps_, (warp + 1) % 32), start = 0;
  }
  return warp * kWarpSize + bit_from(ready_[warp], start);
}

int Scheduler::greedy() {
  while (!(warps_ >> line_[turn_] & 1)) turn_ = (turn_ + 1) % int(line_.size());
  return line_[turn_] * kWarpSize + bit_from(ready_[line_[turn_]], first_lane_);
}

void Scheduler::shuffle() {
  for (int i = int(line_.size()); i > 1; --i) std::swap(line_[i - 1], line_[random() % i]);
  turn_ = 0;
  first_lane_ = random() % kWarpSize;
}

// SplitMix64.
uint64_t Scheduler::random() {
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace nsk::emu
