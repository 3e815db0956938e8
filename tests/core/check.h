// A failed check prints where and what, and the program exits with 1 at the end.
#pragma once

#include <cstdio>

namespace check {

inline int failures = 0;

#define CHECK(condition, ...)                                                   \
  do {                                                                          \
    if (!(condition)) {                                                         \
      if (++check::failures <= 20) {                                            \
        std::printf("%s:%d: failed: %s  ", __FILE__, __LINE__, #condition);     \
        std::printf(" " __VA_ARGS__);                                           \
        std::printf("\n");                                                      \
      }                                                                         \
    }                                                                           \
  } while (0)

inline int result(const char* name) {
  std::printf("%s: %d failed checks\n", name, failures);
  return failures ? 1 : 0;
}

}  // namespace check
