// How messages name places and indices.
#pragma once

#include <cstring>
#include <source_location>
#include <string>

#include "options.h"

namespace nsk::emu {

inline std::string place(std::source_location where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

inline bool same(std::source_location a, std::source_location b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name()));
}

inline std::string name(Dim3 index) {
  std::string text(1, '(');
  text += std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z);
  return text += ')';
}

}  // namespace nsk::emu
