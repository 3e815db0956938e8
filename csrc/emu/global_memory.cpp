#include "global_memory.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace nsk::emu {
namespace {

bool before(const void* p, const std::unique_ptr<Region>& region) { return uintptr_t(p) < uintptr_t(region->begin); }

}  // namespace

Region& GlobalMemory::add(std::string name, void* data, size_t bytes, bool read_only) {
  auto region = std::make_unique<Region>();
  region->name = std::move(name), region->begin = static_cast<char*>(data), region->bytes = bytes;
  region->read_only = read_only;
  // Inputs may share memory, as views of one tensor do; what is written may not.
  for (auto other = regions_.begin(); other != regions_.end();) {
    Region &a = *region, &b = **other;
    const uintptr_t a_begin = uintptr_t(a.begin), b_begin = uintptr_t(b.begin);
    if (a_begin >= b_begin + b.bytes || b_begin >= a_begin + a.bytes) {
      ++other;
      continue;
    }
    if (!a.read_only || !b.read_only) throw std::invalid_argument(a.name + " overlaps " + b.name);
    a.name = b.name + ", " + a.name;
    a.bytes = std::max(a_begin + a.bytes, b_begin + b.bytes) - std::min(a_begin, b_begin);
    a.begin = std::min(a.begin, b.begin);
    other = regions_.erase(other);
  }
  last_ = nullptr;
  const auto next = std::upper_bound(regions_.begin(), regions_.end(), region->begin, before);
  return **regions_.insert(next, std::move(region));
}

void GlobalMemory::poison(Region& region) {
  if (region.bytes) std::memset(region.begin, 0xff, region.bytes);
  region.written.assign(region.bytes, 0);
}

void GlobalMemory::begin_launch() {
  for (auto& region : regions_)
    if (!region->read_only) region->shadow.reset(region->bytes);
}

Region* GlobalMemory::find(const void* p) {
  if (last_ && last_->holds(p, 1)) return last_;
  const auto next = std::upper_bound(regions_.begin(), regions_.end(), p, before);
  if (next == regions_.begin() || !(*std::prev(next))->holds(p, 1)) return nullptr;
  return last_ = std::prev(next)->get();
}

std::string GlobalMemory::name(const void* p) const {
  const Region* nearest = nullptr;
  ptrdiff_t distance = 0;
  for (const auto& region : regions_) {
    const ptrdiff_t at = ptrdiff_t(uintptr_t(p) - uintptr_t(region->begin));
    const ptrdiff_t d = at < 0 ? -at : std::max<ptrdiff_t>(0, at - ptrdiff_t(region->bytes));
    if (!nearest || d < distance) nearest = region.get(), distance = d;
  }
  if (!nearest || distance > (1 << 20)) return "no region of global memory";
  return "byte " + std::to_string(ptrdiff_t(uintptr_t(p) - uintptr_t(nearest->begin))) + " of " +
         std::to_string(nearest->bytes) + " of " + nearest->name;
}

}  // namespace nsk::emu
