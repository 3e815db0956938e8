// Shadow memory: for every word, the accesses that a later one might race with. Exact to the byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "clocks.h"

namespace nsk::emu {

class Shadow {
 public:
  static constexpr size_t kWord = 4;

  // `one_block`: of memory that only one block sees. What was done there before its last common barrier is forgotten.
  explicit Shadow(bool one_block) : one_block_(one_block) {}

  // Forgets everything; `bytes` is the size of the memory that is shadowed.
  void reset(size_t bytes);

  // Enters an access to `record.bytes` (one bit each) of the word, and returns an earlier one that it races with, or
  // null.
  const Record* enter(size_t word, const Record& record, const Clocks& clocks);

  // A cp.async was waited for: its writes are the waiting thread's, made now.
  void settle(size_t word, const Record& record);

 private:
  // Most words have one access to remember; further ones hang on in a list.
  struct Cell {
    Record first;  // none when it has no bytes
    uint32_t more = 0;
  };
  struct Link {
    Record record;
    uint32_t more;
  };
  struct Page {
    static constexpr size_t kCells = 512;
    bool used = false;
    Cell cells[kCells];
  };

  // Whether nothing that is still to come can race with it.
  bool past(const Record& old, const Record& record) const {
    return one_block_ && old.epoch < record.epoch && old.access != Access::copy;
  }
  Cell& cell(size_t word);
  const Record* enter_slowly(Cell& cell, const Record& record, const Clocks& clocks);
  void append(Cell& cell, const Record& record);

  bool one_block_;
  std::vector<std::unique_ptr<Page>> pages_;
  std::vector<Link> links_;  // [0] is not used: 0 ends a list
  uint32_t free_ = 0;
  Record racing_;
};

}  // namespace nsk::emu
