#include "shadow.h"

namespace nsk::emu {
namespace {

bool conflict(Access a, Access b) { return a != b || (a != Access::read && a != Access::atomic); }

// Whether everything that has to come after `before` has to come after `after` as well, so that `before` need not be
// remembered once `after` is. `before` is ordered before `after`, and they share a byte.
bool covers(Access after, Access before) { return after == Access::write || after == Access::copy || after == before; }

}  // namespace

void Shadow::reset(size_t bytes) {
  pages_.resize((bytes + kWord * Page::kCells - 1) / (kWord * Page::kCells));
  for (auto& page : pages_)
    if (page && page->used) *page = Page{};
  links_.resize(1);
  free_ = 0;
}

Shadow::Cell& Shadow::cell(size_t word) {
  auto& page = pages_[word / Page::kCells];
  if (!page) page = std::make_unique<Page>();
  page->used = true;
  return page->cells[word % Page::kCells];
}

const Record* Shadow::enter(size_t word, const Record& record, const Clocks& clocks) {
  Cell& c = cell(word);
  Record& first = c.first;
  if (!c.more) {
    if (!first.bytes || past(first, record)) {
      first = record;
      return nullptr;
    }
    // Other lanes of the warp read the word that one has read.
    if (first.access == Access::read && record.access == Access::read && first.when == record.when &&
        first.bytes == record.bytes && first.warp == record.warp && first.epoch == record.epoch &&
        first.block == record.block) {
      first.lanes |= record.lanes;
      return nullptr;
    }
  }
  return enter_slowly(c, record, clocks);
}

// Checks the access against those remembered, drops those that it makes superfluous and remembers it.
const Record* Shadow::enter_slowly(Cell& cell, const Record& record, const Clocks& clocks) {
  bool merged = false;
  const Record* race = nullptr;
  auto keep = [&](Record& old) {  // false: drop it
    if (!old.bytes || past(old, record)) return false;
    if (!(old.bytes & record.bytes)) return true;
    const bool before = clocks.ordered(old, record);
    if (!before && conflict(old.access, record.access)) racing_ = old, race = &racing_;
    if (before && covers(record.access, old.access)) {
      old.bytes &= ~record.bytes;
      return old.bytes != 0;
    }
    if (!merged && old.access == Access::read && record.access == Access::read && old.when == record.when &&
        old.bytes == record.bytes && old.warp == record.warp && old.epoch == record.epoch && old.block == record.block)
      old.lanes |= record.lanes, merged = true;
    return true;
  };

  for (uint32_t* link = &cell.more; *link;) {
    const uint32_t at = *link;
    if (keep(links_[at].record)) {
      link = &links_[at].more;
    } else {
      *link = links_[at].more;
      links_[at].more = free_, free_ = at;
    }
  }
  if (!keep(cell.first)) {
    cell.first.bytes = 0;
    if (const uint32_t at = cell.more) {
      cell.first = links_[at].record;
      cell.more = links_[at].more;
      links_[at].more = free_, free_ = at;
    }
  }
  if (!merged) append(cell, record);
  return race;
}

void Shadow::append(Cell& cell, const Record& record) {
  if (!cell.first.bytes) {
    cell.first = record;
    return;
  }
  uint32_t at = free_;
  if (at) {
    free_ = links_[at].more;
  } else {
    at = uint32_t(links_.size());
    links_.emplace_back();
  }
  links_[at] = {record, cell.more};
  cell.more = at;
}

void Shadow::settle(size_t word, const Record& record) {
  Cell& c = cell(word);
  auto settle_one = [&](Record& old) {
    if (old.access == Access::copy && old.warp == record.warp && old.lanes == record.lanes)
      old.access = Access::write, old.when = record.when, old.epoch = record.epoch;
  };
  if (c.first.bytes) settle_one(c.first);
  for (uint32_t at = c.more; at; at = links_[at].more) settle_one(links_[at].record);
}

}  // namespace nsk::emu
