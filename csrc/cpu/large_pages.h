// Large pages for memory that was just allocated.
//
// What the system hands out it clears page by page, when each is first touched. At 4 KB a page that costs a training step
// of a deep network a third of its time (what its forward keeps and the gradients of its weights are new memory every
// step); at 2 MB a page little more than the clearing is left. Most Linux systems give large pages to whoever asks.
#pragma once

#include <cstddef>

namespace nsk {

// As nsk_use_large_pages.
void use_large_pages(void* data, size_t bytes);

}  // namespace nsk
