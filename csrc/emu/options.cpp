#include "options.h"

#include "place.h"

namespace nsk::emu {

bool Sync::operator==(const Sync& other) const { return kind == other.kind && same(where, other.where); }

std::string Sync::name() const {
  static const char* const names[] = {"barrier", "__syncwarp", "cp.async commit", "cp.async wait", "fence"};
  return std::string(names[int(kind)]) + " at " + place(where);
}

std::string Options::name() const {
  static const char* const orders[] = {"greedy", "round robin", "random"};
  static const char* const arrivals[] = {"at once", "late", "poisoned"};
  std::string name = std::string(orders[int(order)]) + ", " + arrivals[int(arrival)] + ", seed " + std::to_string(seed);
  if (!races) name += ", no race detector";
  if (flaw) name += (flaw->kind == Flaw::left_out ? ", without " : ", one less at ") + flaw->sync.name();
  return name;
}

std::vector<Options> all_schedules(uint64_t seed) {
  std::vector<Options> all;
  for (Order order : {Order::greedy, Order::round_robin, Order::random})
    for (Arrival arrival : {Arrival::at_once, Arrival::late, Arrival::poisoned})
      all.push_back({order, arrival, seed, true, std::nullopt});
  return all;
}

}  // namespace nsk::emu
