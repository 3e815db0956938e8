// The shared memory of a block: NaN until it is written, with guard bytes around every array.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

namespace nsk::emu {

class SharedMemory {
 public:
  enum State : uint8_t { outside, unwritten, written };

  explicit SharedMemory(size_t dynamic_bytes);

  void begin_block();
  // A name of an array whose guard bytes have changed, or none.
  std::string broken_guard() const;

  char* dynamic() const { return bytes_.get() + kGuard; }
  // The array declared at one place of the source; a template's instances have one each.
  char* array(size_t bytes, size_t align, const std::source_location& where);

  size_t size() const { return kGuard + dynamic_bytes_ + kGuard + kStatic; }
  // Where `p` lies, however far outside.
  ptrdiff_t offset(const void* p) const { return static_cast<const char*>(p) - bytes_.get(); }
  // Whether all of `bytes` bytes are in some array. Elsewhere, state() must not be asked.
  bool inside(ptrdiff_t offset, size_t bytes) const;
  bool all_written(ptrdiff_t offset, size_t bytes) const;
  void mark(ptrdiff_t offset, size_t bytes, State state);
  // e.g. "byte 20 of 4096 of dynamic shared memory"
  std::string name(ptrdiff_t offset) const;

 private:
  struct Array {
    size_t begin, bytes;
    const char* function;  // null: dynamic shared memory
    const char* file;
    unsigned line;
  };
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static constexpr size_t kGuard = 1024, kStatic = 64 << 10;

  void add(const Array& array);

  size_t dynamic_bytes_;
  std::unique_ptr<char[], Free> bytes_;
  std::vector<uint8_t> state_;
  std::vector<Array> arrays_;
  size_t end_ = 0;  // of the last array's guard
};

}  // namespace nsk::emu
