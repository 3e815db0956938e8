// Memory inside kernels: an arena that hands out pieces of one block, and a buffer for what outlives a tile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "large_pages.h"

namespace nsk::NSK_ISA {

// With a null base it hands out nothing usable and only adds up: the same code that lays out a workspace measures it.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}

  template <class T>
  T* take(ptrdiff_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

template <class T>
inline void fill_zero(T* p, ptrdiff_t count) {
  __builtin_memset(p, 0, size_t(count) * sizeof(T));
}

// A 64-byte aligned array; data() is null when the memory could not be had.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(count > 0 ? static_cast<T*>(aligned_alloc(64, (size_t(count) * sizeof(T) + 63) / 64 * 64)) : nullptr),
        failed_(count > 0 && !data_) {
    if (data_) use_large_pages(data_, size_t(count) * sizeof(T));
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  bool failed() const { return failed_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
  bool failed_;
};

}  // namespace nsk::NSK_ISA
