// Pointers into global and shared memory that look like CUDA's and tell the emulator of every access.
//
// p[i] and *p give a Reference, which loads when it is converted to T and stores when it is assigned to. It cannot be
// kept: `auto x = p[i]` gives something that no use of x compiles with, because x would be loaded at each use, and not
// here. Write the type: `const float x = p[i]`.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#include "access.h"

namespace nsk::emu {

template <Space kSpace, class T>
class Pointer;

template <Space kSpace, class T>
class Reference {
  using Value = std::remove_const_t<T>;

 public:
  explicit Reference(T* p) : p_(p) {}
  Reference(const Reference&) = delete;

  operator Value() && {
    access(kSpace, p_, sizeof(T), alignof(T), Access::read);
    Value value;
    std::memcpy(&value, p_, sizeof(T));
    return value;
  }
  Value operator=(Value value) && {
    static_assert(!std::is_const_v<T>, "a store through a pointer to const");
    access(kSpace, p_, sizeof(T), alignof(T), Access::write);
    std::memcpy(static_cast<void*>(p_), &value, sizeof(T));
    return value;
  }
  Value operator=(Reference&& other) && { return std::move(*this) = Value(std::move(other)); }
  template <Space kOther, class U>
  Value operator=(Reference<kOther, U>&& other) && {
    return std::move(*this) = Value(std::remove_const_t<U>(std::move(other)));
  }
  Value operator+=(Value value) && { return std::move(*this) = Value(load() + value); }
  Value operator-=(Value value) && { return std::move(*this) = Value(load() - value); }
  Value operator*=(Value value) && { return std::move(*this) = Value(load() * value); }

  Pointer<kSpace, T> operator&() && { return p_; }

 private:
  Value load() const { return Reference(p_); }

  T* p_;
};

template <Space kSpace, class T>
class Pointer {
 public:
  Pointer() = default;
  Pointer(T* p) : p_(p) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>>
  Pointer(Pointer<kSpace, U> p) : p_(p.raw()) {}

  Reference<kSpace, T> operator[](ptrdiff_t i) const { return Reference<kSpace, T>(p_ + i); }
  Reference<kSpace, T> operator*() const { return Reference<kSpace, T>(p_); }

  Pointer& operator+=(ptrdiff_t n) { return p_ += n, *this; }
  Pointer& operator-=(ptrdiff_t n) { return p_ -= n, *this; }
  Pointer& operator++() { return ++p_, *this; }
  friend Pointer operator+(Pointer p, ptrdiff_t n) { return p.p_ + n; }
  friend Pointer operator+(ptrdiff_t n, Pointer p) { return p.p_ + n; }
  friend Pointer operator-(Pointer p, ptrdiff_t n) { return p.p_ - n; }
  friend ptrdiff_t operator-(Pointer a, Pointer b) { return a.p_ - b.p_; }
  friend auto operator<=>(Pointer a, Pointer b) = default;
  explicit operator bool() const { return p_ != nullptr; }

  T* raw() const { return p_; }  // for the emulator: an access through it goes unseen

 private:
  T* p_ = nullptr;
};

}  // namespace nsk::emu
