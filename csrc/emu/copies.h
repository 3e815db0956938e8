// cp.async: copies to shared memory that are issued, committed in groups and waited for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace nsk::emu {

// Writes `bytes` bytes, of which the first `valid` come from global memory and the others are 0.
void issue_copy(void* to, const void* from, size_t bytes, size_t valid);

void commit_copies(std::source_location where);

// Until at most `groups` of the groups that the thread committed are under way.
void wait_copies(uint64_t groups, std::source_location where);
// Until none is, committed or not.
void wait_all_copies(std::source_location where);

}  // namespace nsk::emu
