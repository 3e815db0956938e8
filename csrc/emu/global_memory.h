// The global memory that a launch may touch: named regions, the rest is out of bounds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "shadow.h"

namespace nsk::emu {

struct Region {
  std::string name;
  char* begin;
  size_t bytes;
  bool read_only;
  std::vector<uint8_t> written;  // of an output: which bytes were; else empty
  Shadow shadow{false};

  bool holds(const void* p, size_t count) const {
    const size_t at = size_t(static_cast<const char*>(p) - begin);
    return at < bytes && count <= bytes - at;
  }
};

class GlobalMemory {
 public:
  // The memory stays the caller's and must outlive this. An input is never written to, and inputs may share memory. An
  // output is filled with NaN, and what no launch has written none may read.
  template <class T>
  const T* input(std::string name, const T* data, size_t count) {
    add(std::move(name), const_cast<T*>(data), count * sizeof(T), true);
    return data;
  }
  template <class T>
  T* output(std::string name, T* data, size_t count) {
    poison(add(std::move(name), data, count * sizeof(T), false));
    return data;
  }
  template <class T>
  T* in_out(std::string name, T* data, size_t count) {
    add(std::move(name), data, count * sizeof(T), false);
    return data;
  }

  void begin_launch();
  // The region that holds the address, or null.
  Region* find(const void* p);
  // For messages: where an address lies, or which region it is near to.
  std::string name(const void* p) const;

 private:
  Region& add(std::string name, void* data, size_t bytes, bool read_only);
  static void poison(Region& region);

  std::vector<std::unique_ptr<Region>> regions_;  // by address
  Region* last_ = nullptr;
};

}  // namespace nsk::emu
