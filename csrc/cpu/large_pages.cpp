#include "large_pages.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>

#include "../include/nsk.h"

namespace nsk {

void use_large_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (bytes < NSK_LEAST_FOR_LARGE_PAGES || begin >= end) return;
  const int error = errno;  // a system without large pages says so there
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  errno = error;
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace nsk

void nsk_use_large_pages(void* data, int64_t bytes) { nsk::use_large_pages(data, bytes > 0 ? size_t(bytes) : 0); }
