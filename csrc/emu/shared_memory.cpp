#include "shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "error.h"

namespace nsk::emu {
namespace {

constexpr unsigned char kPoison = 0xff;  // NaN in every floating type
constexpr unsigned char kCanary = 0xfb;  // NaN as well

}  // namespace

SharedMemory::SharedMemory(size_t dynamic_bytes)
    : dynamic_bytes_((dynamic_bytes + kGuard - 1) / kGuard * kGuard),
      bytes_(static_cast<char*>(std::aligned_alloc(kGuard, size()))),
      state_(size(), outside) {
  if (!bytes_) throw std::bad_alloc();
  std::memset(bytes_.get(), kCanary, size());
  add({kGuard, dynamic_bytes, nullptr, nullptr, 0});
  end_ = kGuard + dynamic_bytes_ + kGuard;
}

void SharedMemory::add(const Array& array) {
  arrays_.push_back(array);
  std::memset(bytes_.get() + array.begin, kPoison, array.bytes);
  std::memset(state_.data() + array.begin, unwritten, array.bytes);
}

void SharedMemory::begin_block() {
  for (const Array& array : arrays_) {
    std::memset(bytes_.get() + array.begin, kPoison, array.bytes);
    std::memset(state_.data() + array.begin, unwritten, array.bytes);
  }
}

std::string SharedMemory::broken_guard() const {
  for (size_t i = 0; i < end_; ++i)
    if (state_[i] == outside && static_cast<unsigned char>(bytes_[i]) != kCanary) return name(ptrdiff_t(i));
  return {};
}

char* SharedMemory::array(size_t bytes, size_t align, const std::source_location& where) {
  for (const Array& a : arrays_)
    if (a.function && a.line == where.line() && a.bytes == bytes && !std::strcmp(a.function, where.function_name()) &&
        !std::strcmp(a.file, where.file_name()))
      return bytes_.get() + a.begin;
  const size_t step = std::max<size_t>(align, 16), begin = (end_ + step - 1) / step * step;
  if (begin + bytes + 128 > size()) fail(Fault::bad_argument, "more static shared memory than a block can have");
  add({begin, bytes, where.function_name(), where.file_name(), where.line()});
  end_ = begin + bytes + 128;
  return bytes_.get() + begin;
}

bool SharedMemory::inside(ptrdiff_t offset, size_t bytes) const {
  if (offset < 0 || size_t(offset) > size() - bytes) return false;
  return !std::memchr(state_.data() + offset, outside, bytes);
}

bool SharedMemory::all_written(ptrdiff_t offset, size_t bytes) const {
  return !std::memchr(state_.data() + offset, unwritten, bytes);
}

void SharedMemory::mark(ptrdiff_t offset, size_t bytes, State state) {
  std::memset(state_.data() + offset, state, bytes);
}

std::string SharedMemory::name(ptrdiff_t offset) const {
  // The nearest array that begins before it.
  const Array* nearest = &arrays_[0];
  for (const Array& a : arrays_)
    if (offset >= ptrdiff_t(a.begin)) nearest = &a;
  const std::string of = nearest->function ? "the shared array of line " + std::to_string(nearest->line)
                                           : std::string("dynamic shared memory");
  return "byte " + std::to_string(offset - ptrdiff_t(nearest->begin)) + " of " + std::to_string(nearest->bytes) +
         " of " + of;
}

}  // namespace nsk::emu
